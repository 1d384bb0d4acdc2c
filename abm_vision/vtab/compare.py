"""Starts side by side: the runs made, their table and their figure written."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from abm_vision import plots
from abm_vision.abm.files import write_atomically
from abm_vision.runs.folder import Diverged
from abm_vision.runs.markup import markdown, markdown_table
from abm_vision.runs.settings import check_used, uses
from abm_vision.vtab.comparison import BASELINE, Comparison, Row
from abm_vision.vtab.config import RunConfig, make_config
from abm_vision.vtab.harness import run

FILES = ("compare.md", "compare.csv", "compare.png")


def run_all(
    tasks: Sequence[str],
    inits: Sequence[str],
    seeds: int,
    rates: Sequence[float],
    settings: Mapping[str, Any],
    out: str | Path,
    *,
    diagnose: bool = True,
    quiet: bool = True,
    say: Callable[[str], None] | None = None,
) -> tuple[list[dict[str, Any]], list[RunConfig]]:
    """Every task, start, rate and seed, finished runs reused. Returns the results, and the runs that diverged.

    Raises:
        ValueError: an empty list, less than one seed, or what a run raises.
    """
    for name, values in (("task", tasks), ("init", inits), ("lr", rates)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} is {', '.join(map(str, values)) or 'empty'}; give one or more, each once")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}; it must be 1 or more")
    if BASELINE not in inits:
        raise ValueError(
            f"init is {', '.join(inits)}; {BASELINE}, which all others are compared with, must be among them"
        )
    check_used(settings, inits)
    say = say or (lambda line: None)
    wanted = list(itertools.product(tasks, inits, rates, range(seeds)))
    configs = [
        make_config(**{k: v for k, v in settings.items() if uses(i, k)}, task=t, init=i, lr=lr, seed=s)
        for t, i, lr, s in wanted
    ]
    found, diverged = [], []
    for number, config in enumerate(configs, 1):
        say(f"--- run {number} of {len(configs)}: {config.task}, {config.init}, lr {config.lr:g}, seed {config.seed}")
        try:
            found.append(run(config, out, quiet=quiet, diagnose=diagnose, say=say))
        except Diverged as error:
            say(f"diverged  {error}")
            diverged.append(config)
    return found, diverged


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "start": lambda r: r.init,
    "best lr": lambda r: f"{r.lr:g}",
    "information loss (seen)": lambda r: (
        "-" if r.seen_loss is None else f"{r.information_loss:.3f} ({r.seen_loss:.3f})"
    ),
    "area": lambda r: _with_error(r.area, r.area_error, 3),
    "ratio": lambda r: _with_interval(r, f"{r.area_ratio:.2f}", f"{r.area_low:.2f} to {r.area_high:.2f}"),
    "ratio, start counted": lambda r: "unknown" if r.timed_ratio is None else f"{r.timed_ratio:.2f}",
    "epochs to baseline's last loss": lambda r: "never" if r.epochs_to is None else f"{r.epochs_to:.1f}",
    "start costs (epochs)": lambda r: "unknown" if r.start_epochs is None else f"{r.start_epochs:.2f}",
    "test top-1 (%)": lambda r: _with_error(100 * r.top1, r.top1_error and 100 * r.top1_error, 1),
    "gain": lambda r: _with_interval(
        r, f"{100 * r.top1_gain:+.1f}", f"{100 * r.top1_low:+.1f} to {100 * r.top1_high:+.1f}"
    ),
}


def _with_error(value: float, error: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _with_interval(row: Row, value: str, interval: str) -> str:
    return f"{value} ({interval})" if row.seeds > 1 else value


def to_text(comparison: Comparison) -> str:
    """The tables for a terminal."""
    parts = []
    for task, rows in _by_task(comparison).items():
        cells = [list(_COLUMNS), *([column(row) for column in _COLUMNS.values()] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(line, widths, strict=True)))
                 for line in cells]  # fmt: skip
        parts.append("\n".join([_title(task, rows), *lines]))
    return "\n\n".join([*parts, _legend(comparison)])


def to_markdown(comparison: Comparison) -> str:
    """The tables, and what every learning rate gave."""
    parts = ["# Starts compared\n"]
    for task, rows in _by_task(comparison).items():
        table = markdown_table(list(_COLUMNS), ([c(row) for c in _COLUMNS.values()] for row in rows))
        parts.append(f"## {markdown(_title(task, rows))}\n\n{table}")
        parts.append(_rates_table(comparison, task))
    parts.append(markdown(_legend(comparison)))
    return "\n\n".join(parts) + "\n"


def _rates_table(comparison: Comparison, task: str) -> str:
    spread = {init: rates for (t, init), rates in comparison.rates.items() if t == task}
    rates = sorted({lr for found in spread.values() for lr in found})
    lines = (
        [init, *("-" if lr not in found else _rate_cell(found[lr]) for lr in rates)] for init, found in spread.items()
    )
    table = markdown_table(["start", *(f"lr {lr:g}" for lr in rates)], lines)
    return f"Area and test top-1 at every learning rate:\n\n{table}"


def _rate_cell(found: tuple[float, float] | None) -> str:
    return "diverged" if found is None else f"{found[0]:.3f}, {100 * found[1]:.1f} %"


def to_csv(comparison: Comparison) -> str:
    """One line a row, the fields of `Row`."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, [f.name for f in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in comparison.rows)
    return stream.getvalue()


def write_report(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `compare.md`, `compare.csv` and `compare.png`; returns their paths."""
    paths = [Path(folder) / name for name in FILES]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, (to_markdown(comparison), to_csv(comparison)), strict=False):
        write_atomically(path, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))
    plots.save_figure(plots.draw_comparison(comparison), paths[2])
    return paths


def _by_task(comparison: Comparison) -> dict[str, list[Row]]:
    tasks: dict[str, list[Row]] = {}
    for row in comparison.rows:
        tasks.setdefault(row.task, []).append(row)
    return tasks


def _title(task: str, rows: Sequence[Row]) -> str:
    seeds = rows[0].seeds
    return f"{task} [{rows[0].source}], {seeds} seed{'s' if seeds > 1 else ''}"


def _legend(comparison: Comparison) -> str:
    s = comparison.settings
    return (
        f"{s['model']}, {s['image_size']} px, rank {s['rank']} on {s['targets']}, {s['epochs']} epochs, {s['device']}. "
        "Every start at the learning rate with its lowest area (training loss averaged over all steps). Ratio and gain "
        f"are to {BASELINE}, paired by seed, with a bootstrap interval over the seeds (of three seeds: their range); ± "
        "is the standard error."
    )
