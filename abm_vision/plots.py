"""Every figure, drawn from result records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from abm_vision.abm.files import write_atomically
from abm_vision.abm.host import layer_kind

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
OKABE_ITO = ("#000000", ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix."""
    write_atomically(path, lambda beside: figure.savefig(beside, dpi=150))


def draw_curves(result: dict[str, Any]) -> Figure:
    """Training loss, with test accuracy where it was followed; beside it what the matching did to every layer."""
    config, test = result["config"], result["test"]
    rendered = " (rendered data)" if result["data"]["test"]["source"] == "rendered" else ""
    return draw_training(
        result,
        f"{config['task']}{rendered}: {100 * test['top1']:.1f} % top-1 of {test['count']:,} {test['split']} images",
    )


def draw_training(result: dict[str, Any], title: str) -> Figure:
    """Training loss; beside it what the matching did to every layer."""
    figure = Figure(figsize=(11 if result["abm"] else 7, 4.2), layout="constrained")
    panels = figure.subplots(
        1, 2 if result["abm"] else 1, squeeze=False, width_ratios=[3, 2] if result["abm"] else [1]
    )[0]
    figure.suptitle(title, fontweight="bold", wrap=True)
    _draw_losses(panels[0], result)
    if result["abm"]:
        _draw_boundaries(panels[1], result["abm"])
    return figure


def draw_information_loss(result: dict[str, Any]) -> Figure:
    """Heat maps, depth by kind of layer: information loss before and after the start, and the best of this rank."""
    before, after = (result["information_loss"][k] for k in ("before", "after"))
    kinds = [kind["name"] for kind in after["kinds"]]
    panels = {
        f"fresh adapter: {before['overall']['loss']:.3f}": _by_depth(before, kinds, "loss"),
        f"{result['config']['init']}: {after['overall']['loss']:.3f}": _by_depth(after, kinds, "loss"),
        f"best of its rank: {after['overall']['optimum']:.3f}": _by_depth(after, kinds, "optimum"),
    }
    depth = len(next(iter(panels.values())))
    figure = Figure(figsize=(2.2 + 0.75 * len(kinds) * 3, 1.6 + 0.32 * depth), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
        axis.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
        axis.set_title(title, fontsize=10)
    axes[0].set(ylabel="depth", yticks=range(depth), yticklabels=range(1, depth + 1))
    figure.colorbar(image, ax=axes, label="information loss")
    config = result["config"]
    source = result["data"]["train"]["source"]
    made_up = f" ({source} data)" if source in ("rendered", "synthetic") else ""
    figure.suptitle(
        f"share of the gradient out of reach, {config.get('task', 'instructions')}{made_up}, r = {config['rank']}",
        fontweight="bold",
    )
    return figure


def draw_comparison(comparison: Any) -> Figure:
    """A row of panels a task: training loss and test top-1 against epochs and seconds, start counted.

    Top-1 that was not followed is drawn as the final one of every seed. A panel with top-1 at every learning rate
    stands where several were tried, one of the information loss where it was measured. Lines are means over seeds,
    bands one standard deviation. `comparison` is a `vtab.comparison.Comparison`.
    """
    tasks = list(dict.fromkeys(row.task for row in comparison.rows))
    starts = list(dict.fromkeys(init for _, init in comparison.best))
    colours = dict(zip(starts, _distinct(len(starts)), strict=True))
    panels = [_loss_by_epoch, _loss_by_seconds]
    if all(run["top1_per_epoch"] for runs in comparison.best.values() for run in runs):
        panels += [_top1_by_epoch, _top1_by_seconds]
    else:
        panels.append(_final_top1)
    if any(len(rates) > 1 for rates in comparison.rates.values()):
        panels.append(_top1_by_rate)
    if any(row.information_loss is not None for row in comparison.rows):
        panels.append(_information_loss)
    figure = Figure(figsize=(3.9 * len(panels), 3.9 * len(tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), len(panels), squeeze=False)
    for line, task in zip(grid, tasks, strict=True):
        rows = [row for row in comparison.rows if row.task == task]
        for axes, panel in zip(line, panels, strict=True):
            panel(axes, comparison, rows, colours)
            _tidy(axes)
        line[0].set_title(f"{task}{' (rendered data)' if rows[0].source == 'rendered' else ''}")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), frameon=False)
    return figure


def _loss_by_epoch(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    for row in rows:
        losses = epoch_losses(comparison.best[row.task, row.init])
        _line_with_band(axes, np.arange(losses.shape[1]) + 0.5, losses, colours[row.init], row.init)
    axes.set(yscale="log", xlabel="epoch", ylabel="training loss")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _plain_log(axes)


def _loss_by_seconds(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    for row in rows:
        runs = comparison.best[row.task, row.init]
        losses = epoch_losses(runs)
        _line_with_band(axes, _seconds(runs, np.arange(losses.shape[1]) + 0.5), losses, colours[row.init], row.init)
    axes.set(yscale="log", xlabel="seconds, start included", ylabel="training loss")
    _plain_log(axes)


def _top1_by_epoch(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    for row in rows:
        _line_with_band(axes, *_followed(comparison.best[row.task, row.init]), colours[row.init], row.init)
    axes.set(xlabel="epoch", ylabel="test top-1 (%)")


def _top1_by_seconds(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    for row in rows:
        runs = comparison.best[row.task, row.init]
        epochs, top1 = _followed(runs)
        _line_with_band(axes, _seconds(runs, epochs), top1, colours[row.init], row.init)
    axes.set(xlabel="seconds, start included", ylabel="test top-1 (%)")


def _final_top1(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    """A dot a seed, a bar at their mean."""
    for position, row in enumerate(rows):
        top1 = [100 * run["test"]["top1"] for run in comparison.best[row.task, row.init]]
        axes.plot(top1, [position] * len(top1), "o", color=colours[row.init], alpha=0.5, markersize=5)
        axes.plot(np.mean(top1), position, "|", color=colours[row.init], markersize=18, markeredgewidth=2)
    _name_rows(axes, rows)
    axes.set(xlabel="test top-1 after the last epoch (%)")


def _top1_by_rate(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
    """Mean over seeds; a rate at which a start diverged has no point."""
    rates = sorted({lr for row in rows for lr in comparison.rates[row.task, row.init]})
    for row in rows:
        found = comparison.rates[row.task, row.init]
        top1 = [100 * found[lr][1] if found.get(lr) else np.nan for lr in rates]
        axes.plot(rates, top1, "o-", color=colours[row.init], markersize=4, linewidth=1.4)
    axes.set(xscale="log", xlabel="learning rate", ylabel="test top-1 (%)")
    axes.set_xticks(rates, [f"{lr:g}" for lr in rates])
    axes.xaxis.set_minor_formatter(NullFormatter())


def _information_loss(axes: Axes, comparison: Any, rows: Sequence[Any], colours: dict[str, Any]) -> None:
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


def _name_rows(axes: Axes, rows: Sequence[Any]) -> None:
    axes.set_yticks(range(len(rows)), [f"{row.init}, lr {row.lr:g}" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)


def epoch_losses(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean training loss of every epoch: (runs, epochs)."""
    return np.array([np.reshape(r["loss_per_step"], (r["config"]["epochs"], -1)).mean(1) for r in runs])


def _seconds(runs: Sequence[dict[str, Any]], epochs: np.ndarray) -> np.ndarray:
    """What the start and so many epochs take, mean over runs."""
    began = np.mean([r["seconds"]["init"] + r["seconds"].get("reference", 0) for r in runs])
    return began + np.mean([np.median(r["seconds_per_epoch"]) for r in runs]) * epochs


def _followed(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs at which top-1 was measured, and its values in percent: (runs, epochs)."""
    epochs = np.array([int(epoch) for epoch in runs[0]["top1_per_epoch"]])
    return epochs, np.array([[100 * run["top1_per_epoch"][str(epoch)] for epoch in epochs] for run in runs])


def draw_tasks(section: Any) -> Figure:
    """A group of bars a task, one bar a method, with its standard deviation; see `vtab.collection.Section`."""
    count = len(section.methods)
    figure = Figure(figsize=(max(6, 1.6 + 0.32 * count * len(section.tasks)), 4), layout="constrained")
    axes = figure.subplots()
    for k, (method, colour) in enumerate(zip(section.methods, _distinct(count), strict=True)):
        cells = [section.cells.get((task, method)) for task in section.tasks]
        places = np.arange(len(cells)) + (k - (count - 1) / 2) * 0.8 / count
        means = [np.nan if cell is None else cell.mean for cell in cells]
        spread = [0 if cell is None or cell.std is None else cell.std for cell in cells]
        axes.bar(
            places, means, 0.74 / count, yerr=spread, color=colour, label=_shown(method), error_kw={"linewidth": 1}
        )
    axes.set_xticks(range(len(section.tasks)), section.tasks, rotation=30, ha="right")
    axes.set(ylabel="test top-1 (%)", ylim=(0, 100), title=_kind(section))
    _tidy(axes)
    figure.legend(loc="outside lower center", ncols=min(5, count), frameon=False)
    return figure


def draw_convergence(section: Any) -> Figure:
    """A panel a task: training loss by epoch, mean over seeds with one standard deviation."""
    tasks, columns = section.tasks, min(4, len(section.tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 2.6 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    colours = dict(zip(section.methods, _distinct(len(section.methods)), strict=True))
    for axes, task in zip(panels.flat, tasks, strict=False):
        for method in section.methods:
            if cell := section.cells.get((task, method)):
                losses = epoch_losses(cell.runs)
                _line_with_band(axes, np.arange(losses.shape[1]) + 0.5, losses, colours[method], method)
        axes.set(yscale="log", title=task, xlabel="epoch", ylabel="training loss")
        _plain_log(axes)
        _tidy(axes)
    for axes in panels.flat[len(tasks) :]:
        axes.set_visible(False)
    found = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(5, len(found)), frameon=False)
    figure.suptitle(_kind(section))
    return figure


def draw_lost(section: Any) -> Figure | None:
    """A heat map a method, depth by kind of layer: mean information loss after the start; None without any.

    Where a method's runs have layers of other kinds or another depth, they get a map of their own.
    """
    found: dict[tuple[str, tuple[str, ...], int], list[np.ndarray]] = {}
    for (_, method), cell in section.cells.items():
        for report in (run["information_loss"]["after"] for run in cell.runs if run["information_loss"]):
            kinds = tuple(kind["name"] for kind in report["kinds"])
            values = _by_depth(report, list(kinds), "loss")
            found.setdefault((method, kinds, len(values)), []).append(values)
    if not found:
        return None
    maps = sorted(found.items(), key=lambda item: section.methods.index(item[0][0]))
    deepest, widths = max(depth for _, _, depth in found), [len(kinds) for (_, kinds, _), _ in maps]
    figure = Figure(figsize=(1.8 + 0.6 * sum(widths) + 0.3 * len(maps), 1.6 + 0.26 * deepest), layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False, width_ratios=widths)[0]
    for axes, ((method, kinds, _), values) in zip(panels, maps, strict=True):
        image = axes.imshow(np.mean(values, axis=0), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
        axes.set_title(_shown(method), fontsize=10)
    panels[0].set(ylabel="depth", yticks=range(deepest), yticklabels=range(1, deepest + 1), ylim=(deepest - 0.5, -0.5))
    figure.colorbar(image, ax=panels, label="information loss")
    figure.suptitle(_kind(section))
    return figure


def _kind(section: Any) -> str:
    return "rendered data, not VTAB-1K" if section.kind == "rendered" else "VTAB-1K"


def _shown(name: str) -> str:
    """A name as it is: between two dollar signs matplotlib would read a formula."""
    return name.replace("$", r"\$")


def _plain_log(axes: Axes) -> None:
    """Ticks such as 0.5, not 5 x 10^-1."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 3 * low else MaxNLocator(4))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line_with_band(axes: Axes, x: np.ndarray, values: np.ndarray, colour: Any, label: str) -> None:
    """`values` is (seeds, points)."""
    mean, spread = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    axes.plot(x, mean, "o-", color=colour, markersize=3, linewidth=1.4, label=_shown(label))
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def _distinct(count: int) -> list[Any]:
    """Okabe and Ito's seven and black while they last, then matplotlib's twenty."""
    return list(OKABE_ITO[:count]) if count <= len(OKABE_ITO) else [colormaps["tab20"](k % 20) for k in range(count)]


def _by_depth(report: dict[str, Any], kinds: list[str], field: str) -> np.ndarray:
    """(depth, kinds); NaN where a block has no such layer."""
    columns = {
        kind: [layer[field] for layer in report["layers"] if layer_kind(layer["name"]) == kind] for kind in kinds
    }
    values = np.full((max(map(len, columns.values())), len(kinds)), np.nan)
    for column, kind in enumerate(kinds):
        values[: len(columns[kind]), column] = columns[kind]
    return values


def _draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    losses = np.array(result["loss_per_step"])
    steps = len(losses) // result["config"]["epochs"]
    epochs = np.arange(1, len(losses) + 1) / steps
    axes.semilogy(epochs, losses, color=BLUE, alpha=0.3, linewidth=1, label="each step")
    means = losses.reshape(-1, steps).mean(1)
    axes.semilogy(np.arange(len(means)) + 0.5, means, "o-", color=BLUE, markersize=4, label="mean of the epoch")
    config = result["config"]
    axes.set(xlabel="epoch", ylabel="training loss (cross-entropy)", xlim=(0, config["epochs"] + 0.1))
    axes.set_title(f"{config['model'].split('.')[0]}, LoRA r = {config['rank']}, start: {config['init']}", fontsize=10)
    _plain_log(axes)
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    followed = result.get("top1_per_epoch", {})
    if followed:
        right = axes.twinx()
        points = {int(k): 100 * v for k, v in followed.items()}
        right.plot(list(points), list(points.values()), "s-", color=ORANGE, markersize=4, label="test top-1")
        right.set_ylabel("test top-1 (%)", color=ORANGE)
        right.set_ylim(0, 100)
        right.spines[["top"]].set_visible(False)
        handles, labels = [a + b for a, b in zip((handles, labels), right.get_legend_handles_labels(), strict=True)]
    axes.legend(handles, labels, frameon=False, loc="center left" if followed else "best")


def _draw_boundaries(axes: Axes, report: dict[str, Any]) -> None:
    depth = np.arange(1, len(report["layers"]) + 1)
    for key, colour, label in (("match", GREEN, "sign as the reference's"), ("inside", ORANGE, "inside the margin")):
        before = [100 * layer["before"][key] for layer in report["layers"]]
        after = [100 * layer["after"][key] for layer in report["layers"]]
        axes.plot(depth, before, "--", color=colour, linewidth=1.2)
        axes.plot(depth, after, "o-", color=colour, markersize=4, label=label)
    axes.plot([], [], "--", color=GREY, label="before matching")
    axes.set(xlabel="matched layer, in order of depth", ylabel="share of hidden units (%)", ylim=(0, 103))
    axes.set_title(f"boundaries matched to {_shown(report['reference'])} in {report['seconds']:.0f} s", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)
    axes.legend(frameon=False, loc="lower left")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
