"""Initialisations side by side: runs that differ in nothing else, as a table, as files and as a figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abm_vision.abm.arguments import count
from abm_vision.analysis import stats
from abm_vision.analysis.comparable import check_seeds, common_settings
from abm_vision.analysis.tables import Table, csv_table, markdown_table, plain_table, write_texts
from abm_vision.initializers import BASELINE
from abm_vision.runs.markup import markdown
from abm_vision.runs.settings import AdapterSettings
from abm_vision.runs.view import Result, View


@dataclass(frozen=True)
class Row:
    """One initialisation on one task, at the learning rate with its lowest training loss.

    Intervals are the 2.5 and 97.5 % quantiles of a bootstrap over seeds. A few seeds are few: of three it is the range.

    Args:
        task, source, init, lr: what was run; source is where its training data are from.
        seeds: number of runs at that rate.
        loss: training loss, mean over steps and seeds; loss_error is the standard error, None for a single seed.
        loss_ratio: to the baseline's, paired by seed; loss_low and loss_high are its interval.
        timed_ratio: the same with the initialisation's cost counted: the curve begins with as many epochs at its first
            value as the initialisation took time for, and ends where the baseline's ends. None if the cost is unknown.
        score: the final one, mean over seeds; score_error is the standard error.
        score_gain: less the baseline's, paired by seed; score_low and score_high are its interval.
        init_epochs: what the initialisation cost, tuned reference included, in training epochs of the same run; None
            if the cost of a given reference is not known.
        epochs_to: epochs until the mean training loss of an epoch is the baseline's last one; None if never.
        timed_epochs_to: the same with the initialisation's cost counted.
        information_loss: after the initialisation, on samples that it did not see, mean over seeds; None where not
            measured.
        seen_loss: the same on samples that it saw.
    """

    task: str
    source: str
    init: str
    lr: float
    seeds: int
    loss: float
    loss_error: float | None
    loss_ratio: float
    loss_low: float
    loss_high: float
    timed_ratio: float | None
    score: float
    score_error: float | None
    score_gain: float
    score_low: float
    score_high: float
    init_epochs: float | None
    epochs_to: float | None
    timed_epochs_to: float | None
    information_loss: float | None
    seen_loss: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows by task and then training loss; for the figure the runs at each best rate, and what every rate gave.

    Args:
        rows: the table.
        best: (task, init) to the results of its runs, in the order of seeds.
        rates: (task, init) to {learning rate: (training loss, score)}, means over seeds; None where a run diverged.
        settings: what all the runs have in common.
        view: the harness's.
    """

    rows: tuple[Row, ...]
    best: Mapping[tuple[str, str], Sequence[Result]]
    rates: Mapping[tuple[str, str], Mapping[float, tuple[float, float] | None]]
    settings: Mapping[str, Any]
    view: View

    @property
    def by_task(self) -> dict[str, list[Row]]:
        """The rows of every task."""
        return {
            task: [row for row in self.rows if row.task == task] for task in dict.fromkeys(r.task for r in self.rows)
        }


def compare(results: Sequence[Result], view: View, diverged: Sequence[AdapterSettings] = ()) -> Comparison:
    """Compare finished runs, among them the baseline's (`kaiming`).

    Args:
        results: contents of `result.json`.
        view: the harness's.
        diverged: runs without a result; their initialisation is not taken at their rate.

    Raises:
        ValueError: the runs differ in more than task, initialisation, rate, seed and settings of the initialisation;
            the message names the fields. Or the baseline is missing, or an initialisation lacks seeds that others have.
    """
    settings = common_settings(results, view)
    groups: dict[tuple[str, str], dict[float, list[Result] | None]] = {}
    for result in results:
        rates = groups.setdefault((view.task_of(result), result["config"]["init"]), {})
        rates.setdefault(result["config"]["lr"], []).append(result)
    for config in diverged:
        groups.setdefault((config.subject, config.init), {})[config.lr] = None
    means = {
        key: {lr: None if runs is None else _means(runs, view) for lr, runs in sorted(rates.items())}
        for key, rates in groups.items()
    }
    best = {}
    for (task, init), rates in means.items():
        whole = {lr: found[0] for lr, found in rates.items() if found is not None}
        if not whole:
            raise ValueError(f"{init} on {task} diverged at every learning rate: add a lower one")
        best[task, init] = sorted(groups[task, init][min(whole, key=whole.get)], key=lambda r: r["config"]["seed"])
    check_seeds(best)
    rows = [_row(task, runs, best[task, BASELINE], view) for (task, _), runs in best.items()]
    tasks = list(dict.fromkeys(task for task, _ in best))
    rows.sort(key=lambda row: (tasks.index(row.task), row.loss))
    return Comparison(tuple(rows), best, means, settings, view)


def _means(runs: Sequence[Result], view: View) -> tuple[float, float]:
    return float(np.mean([*map(stats.training_loss, runs)])), float(np.mean([*map(view.score.value, runs)]))


def _row(task: str, runs: Sequence[Result], baseline: Sequence[Result], view: View) -> Row:
    losses, other_losses, scores, other_scores = (
        np.array([figure(run) for run in found])
        for figure in (stats.training_loss, view.score.value)
        for found in (runs, baseline)
    )
    costs = [stats.cost(run) for run in runs]
    mean_cost = None if None in costs else float(np.mean(costs))
    reached = stats.epochs_to(runs, stats.epoch_losses(baseline).mean(0)[-1])
    loss_low, loss_high = stats.interval(losses / other_losses)
    score_low, score_high = stats.interval(scores - other_scores)
    return Row(
        task=task,
        source=runs[0]["data"]["train"]["source"],
        init=runs[0]["config"]["init"],
        lr=runs[0]["config"]["lr"],
        seeds=len(runs),
        loss=float(losses.mean()),
        loss_error=stats.standard_error(losses),
        loss_ratio=float((losses / other_losses).mean()),
        loss_low=loss_low,
        loss_high=loss_high,
        timed_ratio=None if mean_cost is None else float((_timed(runs) / _timed(baseline)).mean()),
        score=float(scores.mean()),
        score_error=stats.standard_error(scores),
        score_gain=float((scores - other_scores).mean()),
        score_low=score_low,
        score_high=score_high,
        init_epochs=mean_cost,
        epochs_to=reached,
        timed_epochs_to=None if reached is None or mean_cost is None else reached + mean_cost,
        information_loss=_mean_loss(runs, "after"),
        seen_loss=_mean_loss(runs, "after_on_seen"),
    )


def _timed(runs: Sequence[Result]) -> np.ndarray:
    return np.array([stats.delayed_training_loss(run, stats.cost(run)) for run in runs])


def _mean_loss(runs: Sequence[Result], moment: str) -> float | None:
    if not all(run["information_loss"] for run in runs):
        return None
    return float(np.mean([run["information_loss"][moment]["overall"]["loss"] for run in runs]))


# --------------------------------------------------------------------------------------------------- words and files


def _columns(view: View) -> Mapping[str, Callable[[Row], str]]:
    def score(value: float | None, sign: str = "") -> str:
        return f"{view.score.scale * value:{sign}.{view.score.digits}f}"

    return {
        "initialisation": lambda r: r.init,
        "best lr": lambda r: f"{r.lr:g}",
        "information loss (seen)": lambda r: (
            "-" if r.seen_loss is None else f"{r.information_loss:.3f} ({r.seen_loss:.3f})"
        ),
        "training loss": lambda r: _with(f"{r.loss:.3f}", r.seeds, f" ± {r.loss_error or 0:.3f}"),
        "ratio": lambda r: _with(f"{r.loss_ratio:.2f}", r.seeds, f" ({r.loss_low:.2f} to {r.loss_high:.2f})"),
        "ratio, cost counted": lambda r: "unknown" if r.timed_ratio is None else f"{r.timed_ratio:.2f}",
        "epochs to baseline's last loss": lambda r: "never" if r.epochs_to is None else f"{r.epochs_to:.1f}",
        "costs (epochs)": lambda r: "unknown" if r.init_epochs is None else f"{r.init_epochs:.2f}",
        view.score.label: lambda r: _with(score(r.score), r.seeds, f" ± {score(r.score_error or 0)}"),
        "gain" if view.score.higher else "difference (less is better)": lambda r: _with(
            score(r.score_gain, "+"), r.seeds, f" ({score(r.score_low, '+')} to {score(r.score_high, '+')})"
        ),
    }


def _with(value: str, seeds: int, spread: str) -> str:
    return value + spread if seeds > 1 else value


def _tables(comparison: Comparison) -> dict[str, tuple[str, Table]]:
    """Task to the title of its table, and the table."""
    columns, found = _columns(comparison.view), {}
    for task, rows in comparison.by_task.items():
        seeds = rows[0].seeds
        title = f"{task} [{rows[0].source}], {seeds} seed{'s' if seeds > 1 else ''}"
        found[task] = title, Table([*columns], [[column(row) for column in columns.values()] for row in rows])
    return found


def to_text(comparison: Comparison) -> str:
    """The tables for a terminal."""
    parts = [f"{title}\n{plain_table(*table)}" for title, table in _tables(comparison).values()]
    return "\n\n".join([*parts, _legend(comparison)])


def to_markdown(comparison: Comparison) -> str:
    """The tables, and what every learning rate gave."""
    parts = ["# Initialisations compared\n"]
    for task, (title, table) in _tables(comparison).items():
        parts.append(f"## {markdown(title)}\n\n{markdown_table(*table)}")
        rates = markdown_table(*_rates_table(comparison, task))
        parts.append(f"Training loss and {comparison.view.score.title} at every learning rate:\n\n{rates}")
    parts.append(markdown(_legend(comparison)))
    return "\n\n".join(parts) + "\n"


def _rates_table(comparison: Comparison, task: str) -> Table:
    spread = {init: rates for (t, init), rates in comparison.rates.items() if t == task}
    rates = sorted({lr for found in spread.values() for lr in found})
    score = comparison.view.score

    def cell(found: Mapping[float, tuple[float, float] | None], lr: float) -> str:
        if found.get(lr) is None:
            return "diverged" if lr in found else "-"
        loss, value = found[lr]
        return f"{loss:.3f}, {score.scale * value:.{score.digits}f} {score.unit}".rstrip()

    rows = [[init, *(cell(found, lr) for lr in rates)] for init, found in spread.items()]
    return Table(["initialisation", *(f"lr {lr:g}" for lr in rates)], rows)


def records(comparison: Comparison) -> list[dict[str, Any]]:
    """The rows as plain values, for CSV and JSON; the score goes by its own name, such as `top1`."""
    return [
        {name.replace("score", comparison.view.score.key): value for name, value in asdict(row).items()}
        for row in comparison.rows
    ]


def _legend(comparison: Comparison) -> str:
    s = comparison.settings
    most = f" ({count(s['max_steps'], 'step')} at most)" if s.get("max_steps") else ""
    difference = "gain" if comparison.view.score.higher else "difference"
    return (
        f"{comparison.view.model(s)}, rank {s['rank']} on {s['targets']}, {count(s['epochs'], 'epoch')}{most}, "
        f"{s['device']}. Every initialisation at the learning rate with its lowest training loss (mean over all "
        f"steps). Ratio and {difference} are to {BASELINE}, paired by seed, with a bootstrap interval over the seeds "
        "(of three seeds: their range); ± is the standard error."
    )


def write_files(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write `compare.md`, `compare.csv` and a figure of every task; returns their paths."""
    from abm_vision.analysis.figures import draw_comparison
    from abm_vision.drawing import save_figure

    texts = {"compare.md": to_markdown(comparison), "compare.csv": csv_table(records(comparison))}
    tasks = comparison.by_task
    figures = {task: Path(folder) / (f"compare_{task}.png" if len(tasks) > 1 else "compare.png") for task in tasks}
    paths = [*write_texts(folder, texts), *figures.values()]
    for task, path in figures.items():
        save_figure(draw_comparison(comparison, task), path)
    return paths
