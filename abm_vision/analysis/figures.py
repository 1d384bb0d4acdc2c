"""The figures of a comparison and of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullFormatter

from abm_vision.analysis.compare import Comparison, Row
from abm_vision.analysis.sections import Section
from abm_vision.analysis.stats import epoch_losses, seconds_before
from abm_vision.drawing import OKABE_ITO, by_depth, epochs_axis, heat_map, plain_log, shown, tidy
from abm_vision.runs import epochs as by_epoch
from abm_vision.runs.view import Result, Score, stand_in


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """Okabe and Ito's seven and black while they last, then matplotlib's twenty."""
    few = len(names) <= len(OKABE_ITO)
    return {name: OKABE_ITO[k] if few else colormaps["tab20"](k % 20) for k, name in enumerate(names)}


def _draw_band(axes: Axes, x: np.ndarray, values: np.ndarray, colour: Any, label: str) -> None:
    """The mean over seeds and one standard deviation; `values` is (seeds, points)."""
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    axes.plot(x, mean, "o-", color=colour, markersize=3, linewidth=1.4, label=shown(label))
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _losses(runs: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """The middle of every epoch, and its mean training loss: (runs, epochs)."""
    return by_epoch.middles(runs[0]), epoch_losses(runs)


# ----------------------------------------------------------------------------------------------------- a comparison


class Line(NamedTuple):
    """An initialisation in the panels of a task: its row, its runs at the best rate, what every rate gave."""

    row: Row
    runs: Sequence[Result]
    rates: Mapping[float, tuple[float, float] | None]
    colour: Any


Panel = Callable[[Axes, Sequence[Line], Score], None]


def draw_comparison(comparison: Comparison) -> Figure:
    """A row of panels a task: training loss and score against epochs and seconds, the initialisation's counted.

    A score that was not followed is drawn as the final one of every seed. A panel with the score at every learning rate
    stands where several were tried, one of the information loss where it was measured. Lines are means over seeds,
    bands one standard deviation.
    """
    colours, score = _colours([*dict.fromkeys(init for _, init in comparison.best)]), comparison.view.score
    panels: list[Panel] = [partial(_losses_by, seconds=False), partial(_losses_by, seconds=True)]
    if all(score.followed(run) for runs in comparison.best.values() for run in runs):
        panels += [partial(_scores_by, seconds=False), partial(_scores_by, seconds=True)]
    else:
        panels.append(_final_scores)
    if any(len(rates) > 1 for rates in comparison.rates.values()):
        panels.append(_scores_by_rate)
    if any(row.information_loss is not None for row in comparison.rows):
        panels.append(_information_loss)
    by_task = comparison.by_task
    figure = Figure(figsize=(3.9 * len(panels), 3.9 * len(by_task) + 0.6), layout="constrained")
    grid = figure.subplots(len(by_task), len(panels), squeeze=False)
    for line, (task, rows) in zip(grid, by_task.items(), strict=True):
        keys = [(row, (task, row.init)) for row in rows]
        lines = [Line(row, comparison.best[key], comparison.rates[key], colours[row.init]) for row, key in keys]
        for axes, panel in zip(line, panels, strict=True):
            panel(axes, lines, score)
            tidy(axes)
        line[0].set_title(task + stand_in(rows[0].source))
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _losses_by(axes: Axes, lines: Sequence[Line], score: Score, seconds: bool) -> None:
    _draw_curves(axes, lines, _losses, seconds)
    axes.set(yscale="log", ylabel="training loss")
    plain_log(axes)


def _scores_by(axes: Axes, lines: Sequence[Line], score: Score, seconds: bool) -> None:
    def followed(runs: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
        epochs = [*score.followed(runs[0])]
        values = [[score.scale * score.followed(run)[epoch] for epoch in epochs] for run in runs]
        return np.array([*map(float, epochs)]), np.array(values)

    _draw_curves(axes, lines, followed, seconds)
    axes.set(ylabel=score.label)


def _draw_curves(
    axes: Axes,
    lines: Sequence[Line],
    curve: Callable[[Sequence[Result]], tuple[np.ndarray, np.ndarray]],
    seconds: bool,
) -> None:
    """Each line's curve, from its runs to (epochs,) and (runs, epochs), against epochs or seconds."""
    for row, runs, _, colour in lines:
        epochs, values = curve(runs)
        _draw_band(axes, _seconds(runs, epochs) if seconds else epochs, values, colour, row.init)
    if seconds:
        axes.set(xlabel="seconds, initialisation included")
        axes.set_xlim(left=0)
    else:
        epochs_axis(axes)


def _seconds(runs: Sequence[Result], epochs: np.ndarray) -> np.ndarray:
    """What the initialisation and so many epochs take, mean over runs."""
    return np.mean([*map(seconds_before, runs)]) + np.mean([*map(by_epoch.seconds, runs)]) * epochs


def _final_scores(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    """A dot a seed, a bar at their mean."""
    for position, (_, runs, _, colour) in enumerate(lines):
        scores = [*map(score.shown, runs)]
        axes.plot(scores, [position] * len(scores), "o", color=colour, alpha=0.5, markersize=5)
        axes.plot(np.mean(scores), position, "|", color=colour, markersize=18, markeredgewidth=2)
    _name_rows(axes, lines)
    axes.set(xlabel=f"{score.label} {score.moment}")


def _scores_by_rate(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    """Mean over seeds; a rate at which runs diverged has no point."""
    rates = sorted({lr for line in lines for lr in line.rates})
    for _, _, found, colour in lines:
        scores = [score.scale * found[lr][1] if found.get(lr) else np.nan for lr in rates]
        axes.plot(rates, scores, "o-", color=colour, markersize=4, linewidth=1.4)
    axes.set(xscale="log", xlabel="learning rate", ylabel=score.label)
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _information_loss(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    for position, line in enumerate(lines):
        lost = line.row.information_loss
        if lost is not None:
            axes.barh(position, lost, color=line.colour, height=0.6)
            # Long bars have their figure inside.
            place, side, colour = (lost - 0.02, "right", "white") if lost > 0.8 else (lost + 0.02, "left", "black")
            axes.text(place, position, f"{lost:.3f}", va="center", ha=side, color=colour, fontsize=8)
    _name_rows(axes, lines)
    axes.set(xlabel="information loss", xlim=(0, 1))


def _name_rows(axes: Axes, lines: Sequence[Line]) -> None:
    axes.set_yticks(range(len(lines)), [f"{line.row.init}, lr {line.row.lr:g}" for line in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)


# --------------------------------------------------------------------------------------------------------- a report


def draw_tasks(section: Section) -> Figure:
    """A group of bars a task, one bar a method, with its standard deviation."""
    count, score = len(section.methods), section.view.score
    figure = Figure(figsize=(max(6, 1.6 + 0.32 * count * len(section.tasks)), 4), layout="constrained")
    axes = figure.subplots()
    for k, (method, colour) in enumerate(_colours(section.methods).items()):
        cells = [section.cells.get((task, method)) for task in section.tasks]
        places = np.arange(len(cells)) + (k - (count - 1) / 2) * 0.8 / count
        means = [np.nan if cell is None else cell.mean for cell in cells]
        spread = [0 if cell is None or cell.std is None else cell.std for cell in cells]
        label = shown(section.heads[method])
        bars = axes.bar(places, means, 0.74 / count, yerr=spread, color=colour, label=label, error_kw={"linewidth": 1})
        for line in bars.errorbar.lines[2]:  # seen on black bars, too
            line.set_path_effects([withStroke(linewidth=3, foreground="white")])
    axes.set_xticks(range(len(section.tasks)), section.tasks, rotation=30, ha="right")
    axes.set(ylabel=score.label, ylim=score.limits, title=section.kind.title)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(5, count), frameon=False)
    return figure


def draw_convergence(section: Section) -> Figure:
    """A panel a task: training loss by epoch, mean over seeds with one standard deviation."""
    tasks, columns = section.tasks, min(4, len(section.tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.6 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes, task in zip(panels.flat, tasks, strict=False):
        for method, colour in _colours(section.methods).items():
            if cell := section.cells.get((task, method)):
                _draw_band(axes, *_losses(cell.results), colour, section.heads[method])
        axes.set(yscale="log", title=task, ylabel="training loss")
        epochs_axis(axes)
        plain_log(axes)
        tidy(axes)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    found = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(5, len(found), 2 * columns), frameon=False
    )
    figure.suptitle(section.kind.title)
    return figure


def draw_lost(section: Section) -> Figure | None:
    """A heat map a method, depth by kind of layer: mean information loss after the initialisation; None without any.

    Where a method's runs have layers of other kinds or another depth, they get a map of their own.
    """
    found: dict[tuple[str, tuple[str, ...], int], list[np.ndarray]] = {}
    for (_, method), cell in section.cells.items():
        for report in (r["information_loss"]["after"] for r in cell.results if r["information_loss"]):
            kinds = tuple(kind["name"] for kind in report["kinds"])
            values = by_depth(report, list(kinds), "loss")
            found.setdefault((method, kinds, len(values)), []).append(values)
    if not found:
        return None
    maps = sorted(found.items(), key=lambda item: section.methods.index(item[0][0]))
    deepest, widths = max(depth for _, _, depth in found), [len(kinds) for (_, kinds, _), _ in maps]
    figure = Figure(figsize=(1.8 + 0.6 * sum(widths) + 0.3 * len(maps), 1.6 + 0.26 * deepest), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, ((method, kinds, _), values) in zip(panels, maps, strict=True):
        image = heat_map(axes, np.mean(values, axis=0), list(kinds), method)
    panels[0].set(ylabel="depth", yticks=range(deepest), yticklabels=range(1, deepest + 1), ylim=(deepest - 0.5, -0.5))
    figure.colorbar(image, ax=panels, label="information loss")
    figure.suptitle(section.kind.title)
    return figure
