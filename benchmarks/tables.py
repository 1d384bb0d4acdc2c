"""README's tables, printed from the committed result files.

python benchmarks/tables.py            # print them
python benchmarks/tables.py --write    # put them into README.md, between their markers
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
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
    note = f"Median of {content['rounds']} rounds, ViT-S/14, rank 8 on qkv, proj, fc1 and fc2; {device}."
    return f"{table(['time / floor (peak memory)', *head], rows)}\n\n{note}"


def abm_init() -> str:
    content = read("abm_init")
    rows = []
    names = {
        "reference": "reference procedure",
        "ours": "`initialize_lora_abm_weights`",
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


def attention() -> str:
    content = read("attention")
    head = ["", *dict.fromkeys(f"{r['image_size']} px, batch {r['batch']}" for r in content["rows"])]
    rows = [
        [dtype, *(f"{r['fused_over_plain']:.2f}" for r in content["rows"] if r["dtype"] == f"torch.{dtype}")]
        for dtype in ("bfloat16", "float32")
    ]
    device = content["environment"]["device"]
    return f"{table(head, rows)}\n\nMedian of {content['rounds']} rounds, ViT-S/14; {device}."


def families() -> str:
    content = read("families")
    total = [sum(r[k] for r in content["rows"]) for k in ("supported", "models")]
    whole = [f"{r['family']} {r['models']}" for r in content["rows"] if r["supported"] == r["models"]]
    part = [
        f"{r['family']} {r['supported']} of {r['models']}" for r in content["rows"] if 0 < r["supported"] < r["models"]
    ]
    none = [f"{r['family']} {r['models']}" for r in content["rows"] if not r["supported"]]
    return (
        f"With timm {content['timm']}: {total[0]} of {total[1]} transformer architectures "
        f"({100 * total[0] / total[1]:.0f} %), by timm's module.\n\n"
        f"- every model: {', '.join(whole)}\n"
        f"- those with attention: {', '.join(part)}\n"
        f"- refused with a message (their attention or MLP is a convolution of another shape): {', '.join(none)}"
    )


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (training_step, abm_init, attention, families)}


def fill(text: str) -> str:
    """`text` with every `<!-- table: NAME -->` ... `<!-- end -->` filled."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} places for the table {name}, it needs one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into README.md")
    if parser.parse_args().write:
        README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))


if __name__ == "__main__":
    main()
