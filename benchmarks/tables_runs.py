"""Tables of runs and their initialisations: losses, accuracy, information loss."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from ledger import RESULTS, Ledger
from tables_costs import read, table

from abm_vision.analysis.compare import compare
from abm_vision.analysis.stats import training_loss
from abm_vision.vtab import RunConfig
from abm_vision.vtab.view import VIEW

TASKS = ("dsprites_loc", "dsprites_ori")


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


def screening() -> str:
    parts = []
    for task in TASKS:
        records = [r for r in Ledger(f"initializers-{task}").records if r["stage"] == "screen"]
        rates = sorted({r["config"]["lr"] for r in records})
        inits: dict[str, dict[float, dict[str, Any]]] = {}
        for record in records:
            inits.setdefault(record["config"]["init"], {})[record["config"]["lr"]] = record

        def best(found: dict[float, dict[str, Any]]) -> float:
            return min(training_loss(r) for r in found.values() if "loss_per_step" in r)

        rows = [
            [
                _named(next(iter(found.values()))["config"]),
                _lost(found),
                *(_cell(found.get(lr), best(found)) for lr in rates),
                _steady(found),
            ]
            for init, found in sorted(inits.items(), key=lambda item: best(item[1]))
        ]
        head = ["initialisation", "information loss (seen)", *(f"lr {lr:g}" for lr in rates), "rates within a point"]
        device = records[0]["environment"]["device"]
        parts.append(
            f"{task}, rendered; {records[0]['config']['epochs']} epochs, seed 0; {device}:\n\n{table(head, rows)}"
        )
    return "\n\n".join(parts)


def confirmation() -> str:
    """List initialisations with three seeds, each at its best rate; information loss from the screening."""
    parts = []
    for task in TASKS:
        records = Ledger(f"initializers-{task}").records
        seeds: dict[tuple[str, float], set[int]] = {}
        for record in (confirmed := [r for r in records if r["stage"] == "confirm"]):
            seeds.setdefault((record["config"]["init"], record["config"]["lr"]), set()).add(record["config"]["seed"])
        whole = [r for r in confirmed if len(seeds[r["config"]["init"], r["config"]["lr"]]) == 3]
        screened = {r["config"]["init"]: r for r in records if r["stage"] == "screen" and r.get("information_loss")}
        compared = compare(whole, VIEW)
        rows = [
            [
                _named(compared.best[task, row.init][0]["config"]),
                f"{row.lr:g}",
                _lost({0: screened[row.init]}) if row.init in screened else "-",
                f"{row.loss:.3f} ± {row.loss_error:.3f}",
                f"{row.loss_ratio:.2f} ({row.loss_low:.2f} to {row.loss_high:.2f})",
                f"{row.timed_ratio:.2f}",
                f"{row.init_epochs:.1f}",
                f"{100 * row.score:.1f} ± {100 * row.score_error:.1f}",
                f"{100 * row.score_gain:+.1f} ({100 * row.score_low:+.1f} to {100 * row.score_high:+.1f})",
            ]
            for row in compared.rows
        ]
        head = ["initialisation", "best lr", "information loss (seen)", "training loss, mean over steps"]
        head += ["ratio to the default", "its time included", "its cost (epochs)", "test top-1 (%)", "gain"]
        device = whole[0]["environment"]["device"]
        default: dict[float, list[float]] = {}
        for config, top1 in ((r["config"], r["test"]["top1"]) for r in whole):
            if config["init"] == "kaiming":
                default.setdefault(config["lr"], []).append(100 * top1)
        rates = ", ".join(f"{statistics.mean(values):.1f} at {lr:g}" for lr, values in sorted(default.items()))
        parts.append(
            f"{task}, rendered; 12 epochs, seeds 0 to 2; {device}:\n\n{table(head, rows)}\n\n"
            f"`kaiming` at every rate, test top-1 (%): {rates}."
        )
    return "\n\n".join(parts)


def sweep() -> str:
    """List the effect of the settings of our initialisations, at a given rate."""
    parts = []
    for task in TASKS:
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for record in Ledger(f"settings_sweep-{task}").records:
            config = record["config"]
            key = (f"`{config['init']}`", _changed(config) or "defaults", f"{config['lr']:g}")
            found.setdefault(key, []).append(record)
        rows = [
            [
                *settings,
                str(len(runs)),
                _over_seeds(map(training_loss, runs), 3),
                _over_seeds((100 * r["test"]["top1"] for r in runs), 1),
            ]
            for settings, runs in sorted(found.items())
        ]
        head = ["initialisation", "settings", "lr", "seeds", "training loss, mean over steps", "test top-1 (%)"]
        parts.append(f"{task}, rendered; 4 epochs:\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def directions() -> str:
    """List both tasks side by side, the best mean of both first."""
    found = {task: {r["variant"]: r for r in Ledger(f"directions-{task}").records} for task in TASKS}
    names = [name for name in found[TASKS[0]] if all(name in records for records in found.values())]
    names.sort(key=lambda name: sum(records[name]["area"] for records in found.values()))
    rows = [
        [name, *(f"{records[name][k]:.3f}" for records in found.values() for k in ("area", "information_loss"))]
        for name in names
    ]
    head = ["initialisation", *(f"{task}: {what}" for task in TASKS for what in ("training loss", "information loss"))]
    first = found[TASKS[0]][names[0]]
    note = f"Rendered data, seed 0, lr {first['lr']:g}, the first {len(first['loss_per_epoch'])} of 12 epochs."
    return f"{table(head, rows)}\n\n{note}"


def from_adapter() -> str:
    found = {task: {r["trial"]: r for r in Ledger(f"from_adapter-{task}").records} for task in TASKS}
    rows = [
        [
            name,
            *(f"{records[name]['area']:.3f}, {100 * records[name]['top1']:.1f} %" for records in found.values()),
            f"{max(records[name]['start_epochs'] for records in found.values()):.1f}",
        ]
        for name in found[TASKS[0]]
    ]
    head = ["initialised from", *(f"{task}: training loss, test top-1" for task in TASKS), "costs (epochs)"]
    return f"{table(head, rows)}\n\nRendered data, 4 epochs, seed 0, lr {found[TASKS[0]][rows[0][0]]['lr']:g}."


def suite() -> str:
    """List test top-1 of the suite's runs on the rendered tasks, a linear probe beside them."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((RESULTS / "suite").glob("*/result.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        config = result["config"]
        found.setdefault(config["task"], {}).setdefault(config["init"], []).append(result)
    probe = {row["task"]: row["top1"] for row in read("linear_probe")["rows"]}
    inits = ["kaiming", "abm", "abm_aligned"]
    top1 = {task: [[100 * r["test"]["top1"] for r in runs[i]] for i in inits] for task, runs in found.items()}
    rows = [
        [task, f"{100 * probe[task]:.1f}", *(_with_spread(values) for values in columns)]
        for task, columns in top1.items()
    ]
    means = [statistics.mean(statistics.mean(columns[k]) for columns in top1.values()) for k in range(len(inits))]
    rows.append(
        [
            f"mean of these {len(top1)}",
            f"{100 * statistics.mean(probe[task] for task in top1):.1f}",
            *(f"{mean:.1f}" for mean in means),
        ]
    )
    runs = [r for columns in found.values() for several in columns.values() for r in several]
    rates = {i: sorted({f"{r['config']['lr']:g}" for r in runs if r["config"]["init"] == i}) for i in inits}
    head = ["rendered task", "linear probe", *(f"`{i}`, lr {' or '.join(rates[i])}" for i in inits)]
    seeds = len({r["config"]["seed"] for r in runs})
    matched = [r["abm"] for r in runs if r["config"]["init"] == "abm"]
    risen = sum(report["after"]["loss"] > report["before"]["loss"] for report in matched)
    note = (
        f"Test top-1 (%), mean and standard deviation over {seeds} seeds; quick preset, {runs[0]['config']['epochs']} "
        f"epochs; {runs[0]['environment']['device']}. Rendered surrogates: not VTAB-1K.\n"
        f"After `abm` the boundary loss was above its initial value in {risen} of {len(matched)} runs."
    )
    return f"{table(head, rows)}\n\n{note}"


def schedule() -> str:
    """List test top-1 after a few epochs beside that of 12, of the same seeds."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "suite").glob("*-abm-*/result.json")]
    whole = {(r["config"]["task"], r["config"]["seed"]): 100 * r["test"]["top1"] for r in results}
    records = Ledger("schedule").records
    pairs: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        key = record["config"]["task"], record["config"]["seed"]
        pairs.setdefault(key[0], []).append((100 * record["test"]["top1"], whole[key]))
    means = {task: [statistics.mean(column) for column in zip(*found, strict=True)] for task, found in pairs.items()}
    means["mean"] = [statistics.mean(column) for column in zip(*means.values(), strict=True)]
    rows = [[task, f"{few:.1f}", f"{many:.1f}", f"{few - many:+.1f}"] for task, (few, many) in means.items()]
    seeds = sorted({len(found) for found in pairs.values()})
    note = (
        f"Test top-1 (%), `abm`, {' or '.join(map(str, seeds))} seed(s), 5,000 test images (711 of kitti_dist); "
        f"{records[0]['environment']['device']}, 12 epochs on {results[0]['environment']['device']}."
    )
    head = ["rendered task", f"{records[0]['config']['epochs']} epochs", "12 epochs", "difference"]
    return f"{table(head, rows)}\n\n{note}"


def _with_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def nlp_initializers() -> str:
    """List initialisations on the tiny language models, all rates and the spread over seeds."""
    parts = []
    for subject in ("sst2", "rte", "instruct"):
        records = Ledger(f"nlp_initializers-{subject}").records
        found: dict[tuple[str, float], list[dict[str, Any]]] = {}
        for record in records:
            found.setdefault((record["config"]["init"], record["config"]["lr"]), []).append(record)
        rows = [
            [
                f"`{init}`",
                f"{lr:g}",
                str(len(runs)),
                _over_seeds(map(training_loss, runs), 4),
                _over_seeds(map(_text_score, runs), 2),
                f"{statistics.mean(r['seconds']['init'] / _epoch(r) for r in runs):.2f}",
            ]
            for (init, lr), runs in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
        ]
        score = "perplexity of held-out answers" if subject == "instruct" else "validation accuracy (%)"
        head = ["initialisation", "lr", "seeds", "training loss, mean over steps", score, "its cost (epochs)"]
        parts.append(f"{subject}:\n\n{table(head, rows)}")
    device = records[0]["environment"]["device"]
    note = f"tiny-t5 (sst2, rte) and tiny-llama (instruct): stand-ins, made-up data; {device}."
    return "\n\n".join([*parts, note])


def _text_score(record: dict[str, Any]) -> float:
    return record["perplexity"]["after"] if "perplexity" in record else 100 * record["scores"]["validation"]["accuracy"]


def _epoch(record: dict[str, Any]) -> float:
    return record["seconds"]["train"] / record["config"]["epochs"]


def _changed(config: dict[str, Any]) -> str:
    """The settings of an initialisation that differ from today's defaults."""
    own = {k: v for k, v in config.items() if RunConfig.uses(config["init"], k) and k not in RunConfig.shared()}
    defaults = RunConfig.make(init=config["init"]).to_dict()
    given = {k: v for k, v in own.items() if k in defaults and v != defaults[k] and v is not None}
    return ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in given.items())


def _named(config: dict[str, Any]) -> str:
    changed = _changed(config)
    return f"`{config['init']}`" + (f" ({changed})" if changed else "")


def _over_seeds(values: Iterable[float], digits: int) -> str:
    """The mean and, of several values, its standard error."""
    values = list(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return f"{statistics.mean(values):.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _steady(found: dict[float, dict[str, Any]]) -> str:
    """The number of rates at which top-1 is within a point of the best."""
    top1 = [record["test"]["top1"] for record in found.values() if "test" in record]
    return f"{sum(value >= max(top1) - 0.01 for value in top1)} of {len(found)}"


def _lost(found: dict[float, dict[str, Any]]) -> str:
    reports = [r["information_loss"] for r in found.values() if r.get("information_loss")]
    if not reports:
        return "-"
    unseen, seen = (reports[0][moment]["overall"]["loss"] for moment in ("after", "after_on_seen"))
    return f"{unseen:.3f} ({seen:.3f})"


def _cell(record: dict[str, Any] | None, best: float) -> str:
    if record is None:
        return "-"
    if "diverged" in record:
        return "diverged"
    text = f"{training_loss(record):.3f}, {100 * record['test']['top1']:.1f} %"
    return f"**{text}**" if training_loss(record) == best else text
