"""Tables of what things cost: seconds, memory, sizes."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from ledger import RESULTS

from abm_vision.abm.kernels import RANKS

VARIANTS = {"floor": "frozen floor", "ours": "LoRA, ours", "peft": "LoRA, stock peft", "full": "full fine-tuning"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def training_step() -> str:
    content = read("training_step")
    head = [f"{r['image_size']} px, batch {r['batch']}, {r['dtype'].removeprefix('torch.')}" for r in content["rows"]]
    rows = []
    for variant, words in VARIANTS.items():
        found = [r["variants"][variant] for r in content["rows"]]
        rows.append([words, *(f"{f['ratio_to_floor']:.2f} ({f['peak_mib']:.0f} MiB)" for f in found)])
    device = content["environment"]["device"]
    beside = {v: sorted(r["variants"][v]["ratio_to_ours"] for r in content["rows"]) for v in ("peft", "full")}
    note = (
        f"Median, over {content['rounds']} rounds of one step each, of the ratio within a round. Stock peft's step "
        f"takes {_range(beside['peft'], 2)} of the time of ours, full fine-tuning's {_range(beside['full'], 2)}. "
        f"ViT-S/14, rank 8 on qkv, proj, fc1 and fc2; {device}."
    )
    return f"{table(['time / floor (peak memory)', *head], rows)}\n\n{note}"


def gpu_step() -> str:
    """Milliseconds of every variant in every mode; the range of several runs."""
    content = read("gpu_step")
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in content["rows"]:
        if row["rank"] == 8:
            found.setdefault((row["model"], row["mode"]), []).append(row["variants"])
    parts = []
    for model in dict.fromkeys(name for name, _ in found):
        modes = {mode: runs for (name, mode), runs in found.items() if name == model}
        rows = [[words, *(_gpu_cell(runs, variant) for runs in modes.values())] for variant, words in VARIANTS.items()]
        parts.append(table([model, *modes], rows))
    ranks = [
        f"rank {row['rank']} {row['variants']['ours']['ms']:.1f} ms, floor {row['variants']['floor']['ms']:.1f}"
        + " (torch's products: the kernels end at rank 64)" * (row["rank"] > RANKS)
        for row in content["rows"]
        if row["model"] == "vit_base_patch16_224" and row["mode"] == "graph"
    ]
    note = (
        "The smallest of several timings; a range is that of several runs. 224 px, batch 64, bfloat16, rank 8 on qkv, "
        f"proj, fc1 and fc2, random weights; {content['environment']['device']}, torch "
        f"{content['environment']['packages']['torch']}. {content.get('note', '')} "
        f"ViT-B as a graph: {'; '.join(ranks)}."
    )
    return "\n\n".join([*parts, note])


def _gpu_cell(runs: list[dict[str, Any]], variant: str) -> str:
    taken = sorted(run[variant]["ms"] for run in runs)
    over = sorted(run[variant]["ms"] / run["floor"]["ms"] for run in runs)
    first = runs[0][variant]
    exact = f"({first['kernels']}; {first['inside_ms']:.1f}; {first['mib']:.0f})"
    return f"{_range(taken, 1)}, {_range(over, 2)} {exact}"


def _range(values: list[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (values[0], values[-1]))
    return low if low == high else f"{low} to {high}"


def gpu_init() -> str:
    content = read("gpu_init")
    epochs = content["epoch_seconds"]
    rows = [
        [f"`{name}`", f"{min(taken):.2f}", *(f"{min(taken) / epochs[mode]:.1f}" for mode in ("eager", "graph"))]
        for name, taken in content["seconds"].items()
    ]
    head = ["", "seconds (the smallest)", "epochs of eager steps", "epochs of graphs"]
    times = read("gpu_vtab")
    note = (
        f"DINOv2 ViT-S/14, {content['image_size']} px, bfloat16, random weights; an epoch is 16 steps of "
        f"{content['batch']} images, {epochs['eager']:.2f} s eagerly and {epochs['graph']:.3f} s as graphs. One VTAB "
        "task with the preset `paper` (ViT-B/16, 224 px, rendered dSprites; with LoRA dropout, so peft's own forward, "
        f"as a graph): {times['seconds_per_epoch']:.2f} s an epoch of 1,000 images, "
        f"{1e3 * times['seconds_per_test_image']:.2f} ms a test image (`kaiming`). With 100 epochs "
        "and 20,000 test images a task, 19 tasks with 3 seeds would take about "
        f"{times['hours_of_19_tasks_3_seeds']:.1f} h, without reading their images. {content['environment']['device']}."
    )
    return f"{table(head, rows)}\n\n{note}"


def nlp_step() -> str:
    content = read("nlp_step")
    head = [f"{r['model']}, {r['dtype'].removeprefix('torch.')}" for r in content["rows"]]
    rows = [
        [VARIANTS[v], *(f"{r['variants'][v]['ratio_to_floor']:.2f}" for r in content["rows"])]
        for v in ("floor", "ours", "peft")
    ]
    device = content["environment"]["device"]
    note = f"Median of {content['rounds']} rounds, random weights, rank 8 on attention and MLP; {device}."
    return f"{table(['time / floor', *head], rows)}\n\n{note}"


def attention() -> str:
    content = read("attention")
    head = ["", *dict.fromkeys(f"{r['image_size']} px, batch {r['batch']}" for r in content["rows"])]
    rows = [
        [dtype, *(f"{r['fused_over_plain']:.2f}" for r in content["rows"] if r["dtype"] == f"torch.{dtype}")]
        for dtype in ("bfloat16", "float32")
    ]
    device = content["environment"]["device"]
    return f"{table(head, rows)}\n\nMedian of {content['rounds']} rounds, ViT-S/14; {device}."


def abm_init() -> str:
    content = read("abm_init")
    rows = []
    names = {
        "reference": "reference procedure",
        "ours": "`initialize_lora_abm_weights`, as many passes",
        "defaults": "`...`, its defaults",
        "local": '`... (fit="local")`',
        "aligned": "`initialize_lora_aligned_weights`",
    }
    for variant, words in names.items():
        found = [r[variant] for r in content["rounds"]]
        seconds = [f["seconds"] for f in found]
        share = content["summary"]["share_of_epoch"][variant]
        rows.append(
            [
                words,
                f"{statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})",
                f"{share:.2f}",
                f"{statistics.mean(f['before']['held_out_loss'] for f in found):.5f}",
                f"{statistics.mean(f['held_out_loss'] for f in found):.5f}",
                f"{statistics.mean(f['held_out_match'] for f in found):.4f}",
                f"{content['summary']['peak_mib'][variant]:.0f} MiB",
            ]
        )
    head = ["", "time", "of a training epoch", "held-out loss before", "after", "match rate", "memory"]
    device = content["environment"]["device"]
    return f"{table(head, rows)}\n\n{len(content['rounds'])} seeds, {content['precision']}; {device}."


def _before_and_after(run: dict[str, Any]) -> tuple[float, float, float]:
    return run["before"]["held_out_loss"], run["held_out_loss"], run["held_out_match"]


def nlp_init() -> str:
    content = read("nlp_init")
    rows = []
    for name, speedup in content["speedup"].items():
        found = [r for r in content["rounds"] if r["model"] == name]
        for variant, words in (("reference", "reference procedure"), ("ours", "`initialize_lora_abm_weights`")):
            runs = [r[variant] for r in found]
            rows.append(
                [
                    name,
                    words,
                    f"{statistics.median(r['seconds'] for r in runs):.1f} s",
                    f"{speedup:.1f}" if variant == "ours" else "1",
                    *(f"{statistics.mean(values):.5f}" for values in zip(*map(_before_and_after, runs), strict=True)),
                ]
            )
    head = ["model", "", "time", "times faster", "held-out boundary loss before", "after", "match rate"]
    device = content["environment"]["device"]
    seeds = len({r["seed"] for r in content["rounds"]})
    return (
        f"{table(head, rows)}\n\n{seeds} seeds, {content['precision']}; T5-Base's shape has random weights; {device}."
    )


def information_loss() -> str:
    content = read("information_loss")
    rows = [[str(r["batch"]), f"{r['seconds']:.0f} s", f"{r['peak_mib']:.0f} MiB"] for r in content["rows"]]
    head = ["images a batch", "time", "memory above the model"]
    device, precision = content["environment"]["device"], content["rows"][0]["precision"]
    return f"{table(head, rows)}\n\nViT-B/16, 224 px, {content['images']} images, {precision}; {device}."


def rendering() -> str:
    content = read("rendering")
    rows = [[r["task"], f"{r['drawn']:.1f} s", f"{r['again']:.2f} s"] for r in content["rows"]]
    device = content["environment"]["device"]
    return f"{table(['1,000 images of', 'drawn', 'again'], rows)}\n\n{device}."


def data_path() -> str:
    content = read("data_path")
    rows = []
    for row in content["rows"]:
        shares = (f"{100 * row['data'][k] / row['whole'][k]:.1f} % of {row['whole'][k]:.1f} s" for k in row["whole"])
        rows.append([row["task"], *shares])
    head = ["task", "a training epoch", "a test on 1,000 images"]
    device = content["environment"]["device"]
    return f"{table(head, rows)}\n\nViT-S/14 at 70 px, {content['rows'][0]['precision']}; {device}."


def fast_layer() -> str:
    content = read("fast_layer")
    head = [f"{r['model']}, {r['dtype'].removeprefix('torch.')}" for r in content["rows"]]
    names = {"full": "full fine-tuning"}
    for targets in ("default", "all-linear"):
        words = "query and value" if targets == "default" else "all linear layers"
        names |= {f"peft, {targets}": f"LoRA on {words}", f"ours, {targets}": "the same after `use_merged_linear`"}
    rows = [
        [words, *(f"{r['variants'][variant]['ratio_to_floor']:.2f}" for r in content["rows"])]
        for variant, words in names.items()
    ]
    shapes = {"bert": "768 wide, 4 layers", "llama": "2,048 wide, 2 layers"}
    batches = {r["model"]: r["batch"] for r in content["rows"]}
    said = "; ".join(f"{name}: {shapes[name]}, {count} x {tokens} tokens" for name, (count, tokens) in batches.items())
    device = content["environment"]["device"]
    note = f"Median of {content['rounds']} rounds, random weights, rank 8. {said}. {device}."
    return f"{table(['time of a step / frozen floor', *head], rows)}\n\n{note}"


def tune() -> str:
    content = read("tune")
    rows, speed = [], {}
    for data in dict.fromkeys(r["data"] for r in content["runs"]):
        for who, words in (("stock", "timm and peft"), ("ours", "`abm-tune --init kaiming`")):
            runs = [r for r in content["runs"] if (r["data"], r["who"]) == (data, who)]
            epoch = statistics.median(s for r in runs for s in r["epochs"])
            whole = statistics.median(r["seconds"] for r in runs)
            speed[data, who] = epoch
            gain = f"{speed[data, 'stock'] / epoch:.2f}"
            rows.append([data, words, f"{epoch:.1f} s", gain, f"{whole:.0f} s", _spread(100 * r["test"] for r in runs)])
    head = ["photographs", "", "a training epoch", "times faster", "start to result", "test top-1 (%)"]
    seeds = len({r["seed"] for r in content["runs"]})
    note = (
        f"DINOv2 ViT-S/14, 112 px, rank 8, {content['epochs']} epochs, {content['precision']}; median over epochs and "
        f"{seeds} seeds, top-1 with its range; {content['environment']['device']}."
    )
    return f"{table(head, rows)}\n\n{note}"


def workers() -> str:
    content = read("workers")
    rows = [[f"`--augment {r['augment']}`", str(r["workers"]), f"{r['seconds']:.1f} s"] for r in content["rows"]]
    note = (
        f"{content['images']} photographs of 500 x 500 pixels, DINOv2 ViT-S/14 at 70 px, {content['precision']}, "
        f"median of two; {content['environment']['device']}."
    )
    return f"{table(['', '`--workers`', 'a training epoch'], rows)}\n\n{note}"


def _spread(values: Iterable[float]) -> str:
    values = sorted(values)
    return f"{statistics.mean(values):.1f} ({values[0]:.1f} to {values[-1]:.1f})"


def export() -> str:
    content = read("export")
    tuned = content["tuned"]
    names = {"adapter": "torch, adapter", "merged": "torch, merged", "onnxruntime": "onnxruntime"}
    head = ["", *(f"ms an image, batch {batch}" for batch in tuned["milliseconds"]), "largest difference of a logit"]
    rows = [
        [
            words,
            *(f"{found[name]:.1f}" for found in tuned["milliseconds"].values()),
            f"{tuned['difference'][name]:.1g}",
        ]
        for name, words in names.items()
    ]
    note = (
        f"DINOv2 ViT-S/14 at 112 px, tuned on photographs; float32; differences on {tuned['photographs']} of them, of "
        f"logits up to {tuned['largest_logit']:.1f}; {content['environment']['device']}."
    )
    kinds = ("onnx", "torch", "timm")
    others = [[row["model"], *(_exported(row[to]) for to in kinds)] for row in content["families"]]
    return f"{table(head, rows)}\n\n{note}\n\n{table(['random weights', *kinds], others)}"


def _exported(found: dict[str, Any]) -> str:
    return found.get("refused") or f"{found['difference']:.1g} of {found['largest_logit']:.2g}"
