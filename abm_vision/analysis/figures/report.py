"""The figures of a report."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from abm_vision.analysis.figures import by_depth, distinct, heat_map, line_with_band, plain_log, shown, tidy
from abm_vision.analysis.sections import Section
from abm_vision.analysis.stats import epoch_losses


def draw_tasks(section: Section) -> Figure:
    """A group of bars a task, one bar a method, with its standard deviation."""
    count = len(section.methods)
    figure = Figure(figsize=(max(6, 1.6 + 0.32 * count * len(section.tasks)), 4), layout="constrained")
    axes = figure.subplots()
    for k, (method, colour) in enumerate(zip(section.methods, distinct(count), strict=True)):
        cells = [section.cells.get((task, method)) for task in section.tasks]
        places = np.arange(len(cells)) + (k - (count - 1) / 2) * 0.8 / count
        means = [np.nan if cell is None else cell.mean for cell in cells]
        spread = [0 if cell is None or cell.std is None else cell.std for cell in cells]
        axes.bar(places, means, 0.74 / count, yerr=spread, color=colour, label=shown(method), error_kw={"linewidth": 1})
    axes.set_xticks(range(len(section.tasks)), section.tasks, rotation=30, ha="right")
    axes.set(ylabel=section.view.label, ylim=section.view.limits, title=section.kind.title)
    tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(5, count), frameon=False)
    return figure


def draw_convergence(section: Section) -> Figure:
    """A panel a task: training loss by epoch, mean over seeds with one standard deviation."""
    tasks, columns = section.tasks, min(4, len(section.tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.6 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    colours = dict(zip(section.methods, distinct(len(section.methods)), strict=True))
    for axes, task in zip(panels.flat, tasks, strict=False):
        for method in section.methods:
            if cell := section.cells.get((task, method)):
                losses = epoch_losses(cell.runs)
                line_with_band(axes, np.arange(losses.shape[1]) + 0.5, losses, colours[method], method)
        axes.set(yscale="log", title=task, xlabel="epoch", ylabel="training loss")
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
        for report in (run["information_loss"]["after"] for run in cell.runs if run["information_loss"]):
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
