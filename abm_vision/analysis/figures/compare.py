"""The figure of a comparison of initialisations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from abm_vision.analysis.compare import Comparison, Row
from abm_vision.analysis.figures import distinct, line_with_band, plain_log, tidy
from abm_vision.analysis.stats import epoch_losses
from abm_vision.analysis.view import Result, View, stand_in

Panel = Callable[[Axes, Comparison, Sequence[Row], dict[str, Any]], None]


def draw_comparison(comparison: Comparison) -> Figure:
    """A row of panels a task: training loss and score against epochs and seconds, the initialisation's counted.

    A score that was not followed is drawn as the final one of every seed. A panel with the score at every learning rate
    stands where several were tried, one of the information loss where it was measured. Lines are means over seeds,
    bands one standard deviation.
    """
    names = list(dict.fromkeys(init for _, init in comparison.best))
    colours = dict(zip(names, distinct(len(names)), strict=True))
    panels: list[Panel] = [_loss_by_epoch, _loss_by_seconds]
    if all(run.get("top1_per_epoch") for runs in comparison.best.values() for run in runs):
        panels += [_score_by_epoch, _score_by_seconds]
    else:
        panels.append(_final_score)
    if any(len(rates) > 1 for rates in comparison.rates.values()):
        panels.append(_score_by_rate)
    if any(row.information_loss is not None for row in comparison.rows):
        panels.append(_information_loss)
    by_task = comparison.by_task
    figure = Figure(figsize=(3.9 * len(panels), 3.9 * len(by_task) + 0.6), layout="constrained")
    grid = figure.subplots(len(by_task), len(panels), squeeze=False)
    for line, (task, rows) in zip(grid, by_task.items(), strict=True):
        for axes, panel in zip(line, panels, strict=True):
            panel(axes, comparison, rows, colours)
            tidy(axes)
        line[0].set_title(task + stand_in(rows[0].source))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _loss_by_epoch(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    for row in rows:
        losses = epoch_losses(comparison.best[row.task, row.init])
        line_with_band(axes, np.arange(losses.shape[1]) + 0.5, losses, colours[row.init], row.init)
    axes.set(yscale="log", xlabel="epoch", ylabel="training loss")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    plain_log(axes)


def _loss_by_seconds(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    for row in rows:
        runs = comparison.best[row.task, row.init]
        losses = epoch_losses(runs)
        line_with_band(axes, _seconds(runs, np.arange(losses.shape[1]) + 0.5), losses, colours[row.init], row.init)
    axes.set(yscale="log", xlabel="seconds, initialisation included", ylabel="training loss")
    plain_log(axes)


def _score_by_epoch(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    for row in rows:
        line_with_band(
            axes, *_followed(comparison.best[row.task, row.init], comparison.view), colours[row.init], row.init
        )
    axes.set(xlabel="epoch", ylabel=comparison.view.label)


def _score_by_seconds(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    for row in rows:
        runs = comparison.best[row.task, row.init]
        epochs, scores = _followed(runs, comparison.view)
        line_with_band(axes, _seconds(runs, epochs), scores, colours[row.init], row.init)
    axes.set(xlabel="seconds, initialisation included", ylabel=comparison.view.label)


def _final_score(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    """A dot a seed, a bar at their mean."""
    for position, row in enumerate(rows):
        scores = [*map(comparison.view.shown, comparison.best[row.task, row.init])]
        axes.plot(scores, [position] * len(scores), "o", color=colours[row.init], alpha=0.5, markersize=5)
        axes.plot(np.mean(scores), position, "|", color=colours[row.init], markersize=18, markeredgewidth=2)
    _name_rows(axes, rows)
    axes.set(xlabel=f"{comparison.view.label} {comparison.view.moment}")


def _score_by_rate(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    """Mean over seeds; a rate at which runs diverged has no point."""
    rates = sorted({lr for row in rows for lr in comparison.rates[row.task, row.init]})
    for row in rows:
        found = comparison.rates[row.task, row.init]
        scores = [comparison.view.scale * found[lr][1] if found.get(lr) else np.nan for lr in rates]
        axes.plot(rates, scores, "o-", color=colours[row.init], markersize=4, linewidth=1.4)
    axes.set(xscale="log", xlabel="learning rate", ylabel=comparison.view.label)
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _information_loss(axes: Axes, comparison: Comparison, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    for position, row in enumerate(rows):
        if row.information_loss is not None:
            axes.barh(position, row.information_loss, color=colours[row.init], height=0.6)
            # Long bars have their figure inside.
            inside = row.information_loss > 0.8
            place, side, colour = row.information_loss, "right" if inside else "left", "white" if inside else "black"
            place += -0.02 if inside else 0.02
            axes.text(place, position, f"{row.information_loss:.3f}", va="center", ha=side, color=colour, fontsize=8)
    _name_rows(axes, rows)
    axes.set(xlabel="information loss", xlim=(0, 1))


def _name_rows(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row.init}, lr {row.lr:g}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def _seconds(runs: Sequence[Result], epochs: np.ndarray) -> np.ndarray:
    """What the initialisation and so many epochs take, mean over runs."""
    before = np.mean([r["seconds"]["init"] + r["seconds"].get("reference", 0) for r in runs])
    return before + np.mean([np.median(r["seconds_per_epoch"]) for r in runs]) * epochs


def _followed(runs: Sequence[Result], view: View) -> tuple[np.ndarray, np.ndarray]:
    """Epochs at which the score was measured, and its values in its unit: (runs, epochs)."""
    epochs = np.array([int(epoch) for epoch in runs[0]["top1_per_epoch"]])
    return epochs, np.array([[view.scale * run["top1_per_epoch"][str(epoch)] for epoch in epochs] for run in runs])
