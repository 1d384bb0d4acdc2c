"""The figures of a comparison and of a report. Two panels beside each other are as wide as a page."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from abm_vision.analysis.compare import Comparison, Row
from abm_vision.analysis.sections import Section
from abm_vision.analysis.stats import epoch_losses, interval, seconds_before
from abm_vision.drawing import (
    COLUMN,
    GREY,
    by_depth,
    epochs_axis,
    heat_map,
    panels_of,
    plain_log,
    shown,
    style_of,
    styles_of,
    tidy,
)
from abm_vision.initializers import BASELINE
from abm_vision.runs import epochs as by_epoch
from abm_vision.runs.view import Result, Score, stand_in

Style = Mapping[str, str]


def _draw_band(axes: Axes, x: np.ndarray, values: np.ndarray, style: Style, label: str) -> None:
    """The mean over seeds, and their range, which stays on a logarithmic axis; `values` is (seeds, points)."""
    axes.plot(x, values.mean(0), **style, markersize=4, linewidth=1.4, label=shown(label))
    axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.15, linewidth=0)


def _draw_spread(axes: Axes, place: float, values: np.ndarray, ends: tuple[float, float], style: Style) -> None:
    """A dot a seed, a line from end to end, and a mark at the mean, at a height of the axes."""
    axes.hlines(place, *ends, color=style["color"], linewidth=1.4)
    axes.plot(values, [place] * len(values), ".", color=style["color"], alpha=0.5, markersize=5)
    axes.plot(values.mean(), place, color=style["color"], marker=style["marker"], markersize=6, linestyle="none")


def _name_rows(axes: Axes, names: Iterable[str]) -> None:
    """Names from above to below, with faint lines along the values."""
    names = [*map(shown, names)]
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#E6E6E6", linewidth=0.8)


def _losses(runs: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """The middle of every epoch, and its mean training loss: (runs, epochs)."""
    return by_epoch.middles(runs[0]), epoch_losses(runs)


# ----------------------------------------------------------------------------------------------------- a comparison


class Line(NamedTuple):
    """An initialisation in the panels of a task: its row, its runs at the best rate, what every rate gave."""

    row: Row
    runs: Sequence[Result]
    rates: Mapping[float, tuple[float, float] | None]
    style: Style


Curve = Callable[[Sequence[Result]], tuple[np.ndarray, np.ndarray]]
Panel = Callable[[Axes, Sequence[Line], Score], None]


def draw_comparison(comparison: Comparison, task: str) -> Figure:
    """Panels of a task: training loss and score against epochs and seconds, the initialisation's counted.

    Beside them the differences to the baseline. A score that was not followed is drawn as the final one of every seed.
    A panel with the score at every learning rate stands where several were tried, one of the information loss where it
    was measured. Lines are means over seeds, bands their range.
    """
    score, rows = comparison.view.score, comparison.by_task[task]
    lines = [
        Line(row, comparison.best[task, row.init], comparison.rates[task, row.init], style_of(row.init)) for row in rows
    ]
    panels: list[Panel] = [partial(_losses_by, seconds=False), partial(_losses_by, seconds=True)]
    if all(score.followed(run) for line in lines for run in line.runs):
        panels += [partial(_scores_by, seconds=False), partial(_scores_by, seconds=True)]
    else:
        panels.append(_final_scores)
    if len(lines) > 1:
        panels.append(_differences)
    if any(len(line.rates) > 1 for line in lines):
        panels.append(_scores_by_rate)
    if any(row.information_loss is not None for row in rows):
        panels.append(_information_loss)
    names, height = -(-len(lines) // 4), max(2.5, 0.9 + 0.34 * len(lines))
    figure = Figure(figsize=(2 * COLUMN, -(-len(panels) // 2) * height + 0.25 * names + 0.4), layout="constrained")
    figure.suptitle(task + stand_in(rows[0].source), fontweight="bold")
    for axes, panel in zip(panels_of(figure, len(panels)), panels, strict=True):
        panel(axes, lines, score)
        tidy(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
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


def _draw_curves(axes: Axes, lines: Sequence[Line], curve: Curve, seconds: bool) -> None:
    """Each line's curve, from its runs to (epochs,) and (runs, epochs), against epochs or seconds."""
    for row, runs, _, style in lines:
        epochs, values = curve(runs)
        _draw_band(axes, _seconds(runs, epochs) if seconds else epochs, values, style, row.init)
    if seconds:
        axes.set(xlabel="time (s), initialisation included")
        axes.set_xlim(left=0)
    else:
        epochs_axis(axes)


def _seconds(runs: Sequence[Result], epochs: np.ndarray) -> np.ndarray:
    """What the initialisation and so many epochs take, mean over runs."""
    return np.mean([*map(seconds_before, runs)]) + np.mean([*map(by_epoch.seconds, runs)]) * epochs


def _final_scores(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    for place, line in enumerate(lines):
        values = np.array([*map(score.shown, line.runs)])
        _draw_spread(axes, place, values, (values.min(), values.max()), line.style)
    _name_rows(axes, map(_name, lines))
    axes.set(xlabel=f"{score.label},\n{score.moment}")


def _differences(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    """Paired by seed, with the interval of the table; the baseline is the line at zero."""
    (baseline,) = (line for line in lines if line.row.init == BASELINE)
    others = [line for line in lines if line is not baseline]
    less = np.array([*map(score.shown, baseline.runs)])
    for place, line in enumerate(others):
        ends = score.scale * line.row.score_low, score.scale * line.row.score_high
        _draw_spread(axes, place, np.array([*map(score.shown, line.runs)]) - less, ends, line.style)
    axes.axvline(0, color=GREY, linewidth=1.4)
    _name_rows(axes, map(_name, others))
    words = ", 95 % interval" if len(less) > 1 else ""
    axes.set(xlabel=f"{score.title}{words}:\n{score.difference}")


def _scores_by_rate(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    """Mean over seeds; a rate at which runs diverged has no point."""
    rates = sorted({lr for line in lines for lr in line.rates})
    for _, _, found, style in lines:
        scores = [score.scale * found[lr][1] if found.get(lr) else np.nan for lr in rates]
        axes.plot(rates, scores, **style, markersize=4, linewidth=1.4)
    axes.set(xscale="log", xlabel="learning rate", ylabel=score.label)
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _information_loss(axes: Axes, lines: Sequence[Line], score: Score) -> None:
    for place, (row, _, _, style) in enumerate(lines):
        if row.information_loss is not None:
            axes.plot(row.information_loss, place, **style, linestyle="none")
            side, away = ("right", -7) if row.information_loss > 0.5 else ("left", 7)
            words = f"{row.information_loss:.3f}"
            at = {"xytext": (away, 0), "textcoords": "offset points", "ha": side, "va": "center"}
            axes.annotate(words, (row.information_loss, place), fontsize=9, **at)
    _name_rows(axes, map(_name, lines))
    axes.set(xlabel="information loss", xlim=(-0.03, 1.03))


def _name(line: Line) -> str:
    return f"{line.row.init}\nlr {line.row.lr:g}"


# --------------------------------------------------------------------------------------------------------- a report


def draw_tasks(section: Section) -> Figure:
    """A line a task: the score of every method, a mark at its mean, and its standard deviation over seeds."""
    count, score = len(section.methods), section.view.score
    names = -(-count // 3)
    height = 1.2 + len(section.tasks) * (0.16 + 0.1 * count) + 0.25 * names
    figure = Figure(figsize=(2 * COLUMN, height), layout="constrained")
    axes = figure.subplots()
    for k, (method, style) in enumerate(styles_of(section.inits).items()):
        cells = [section.cells.get((task, method)) for task in section.tasks]
        places = np.arange(len(cells)) + (k - (count - 1) / 2) * 0.7 / count
        means = [np.nan if cell is None else cell.mean for cell in cells]
        spread = [0 if cell is None or cell.std is None else cell.std for cell in cells]
        label, points = shown(section.heads[method]), {**style, "linestyle": "none"}
        axes.errorbar(means, places, xerr=spread, **points, markersize=5, elinewidth=1.2, label=label)
    for between in np.arange(1, len(section.tasks)) - 0.5:
        axes.axhline(between, color="#E6E6E6", linewidth=0.8)
    tidy(axes)
    axes.grid(False)
    _name_rows(axes, section.tasks)
    axes.set(xlabel=score.label, title=section.kind.title)
    figure.legend(loc="outside lower center", ncols=min(3, count), frameon=False)
    return figure


def draw_differences(section: Section) -> Figure | None:
    """A panel a method: differences to the baseline, paired by seed, and their mean over tasks; None without any.

    Lines are 95 % intervals by a bootstrap, of a task over seeds, of the mean over tasks.
    """
    methods = [found.method for found in section.paired()]
    if not methods:
        return None
    rows = -(-len(methods) // 2)
    height = rows * (0.9 + 0.24 * (len(section.tasks) + 1)) + 0.6
    figure = Figure(figsize=(2 * COLUMN, height), layout="constrained")
    panels, styles = panels_of(figure, len(methods), sharex=True, sharey=True), styles_of(section.inits)
    for axes, method in zip(panels, methods, strict=True):
        found = section.differences(method)
        for place, task in enumerate(section.tasks):
            if task in found:
                _draw_spread(axes, place, found[task], interval(found[task]), styles[method])
        means = np.array([values.mean() for values in found.values()])
        _draw_spread(axes, len(section.tasks), means, interval(means), styles[method])
        axes.axvline(0, color=GREY, linewidth=1.4)
        axes.axhline(len(section.tasks) - 0.5, color="black", linewidth=0.8)
        tidy(axes)
        axes.grid(False)
        _name_rows(axes, [*section.tasks, "mean over tasks"])
        axes.set_title(shown(section.heads[method]), fontsize=10)
    few = "dots: seeds (last row: tasks); lines: 95 % intervals by a bootstrap, of two or three dots their range"
    figure.supxlabel(f"{section.view.score.title}, {section.view.score.difference}\n{few}", fontsize=9)
    figure.suptitle(section.kind.title)
    return figure


def draw_convergence(section: Section) -> Figure:
    """A panel a task: training loss by epoch, mean over seeds with their range."""
    tasks, count = section.tasks, len(section.methods)
    height = -(-len(tasks) // 2) * 2.4 + 0.5 + 0.25 * -(-count // 3)
    figure = Figure(figsize=(2 * COLUMN, height), layout="constrained")
    panels = panels_of(figure, len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for method, style in styles_of(section.inits).items():
            if cell := section.cells.get((task, method)):
                _draw_band(axes, *_losses(cell.results), style, section.heads[method])
        axes.set(yscale="log", title=task, ylabel="training loss")
        epochs_axis(axes)
        plain_log(axes)
        tidy(axes)
    found = {label: h for axes in panels for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(3, len(found)), frameon=False)
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
    deepest = max(depth for _, _, depth in found)
    rows = -(-len(maps) // 3)
    figure = Figure(figsize=(2 * COLUMN, rows * (1.2 + 0.18 * deepest) + 0.4), layout="constrained")
    panels = panels_of(figure, len(maps), columns=3)
    for place, (axes, ((method, kinds, _), values)) in enumerate(zip(panels, maps, strict=True)):
        image = heat_map(axes, np.mean(values, axis=0), list(kinds), method)
        axes.set(ylim=(deepest - 0.5, -0.5), ylabel="" if place % 3 else "block")
        axes.set_yticks(range(deepest), [k if k % 2 else "" for k in range(1, deepest + 1)], fontsize=8)
    figure.colorbar(image, ax=panels, label="information loss")
    figure.suptitle(section.kind.title)
    return figure
