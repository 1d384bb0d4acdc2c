"""Figures of one run: its training, and the information loss of its initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abm_vision.drawing import BLUE, GREEN, GREY, ORANGE, by_depth, epochs_axis, heat_map, plain_log, shown, tidy
from abm_vision.runs import epochs as by_epoch
from abm_vision.runs.view import stand_in


def draw_training(result: dict[str, Any], title: str) -> Figure:
    """Training loss, with accuracy where it was followed; beside it what the matching did to every layer."""
    matched = result["abm"]
    figure = Figure(figsize=(11 if matched else 7, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, width_ratios=[3, 2]) if matched else [figure.subplots()]
    figure.suptitle(title, fontweight="bold", wrap=True)
    _draw_losses(panels[0], result)
    if matched:
        _draw_boundaries(panels[1], matched)
    return figure


def _draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    losses = np.array(result["loss_per_step"])
    steps = by_epoch.steps_per_epoch(result)
    epochs = np.arange(1, len(losses) + 1) / steps
    axes.semilogy(epochs, losses, color=BLUE, alpha=0.3, linewidth=1, label="each step")
    means = by_epoch.mean_losses(result)
    axes.semilogy(by_epoch.middles(result), means, "o-", color=BLUE, markersize=4, label="mean of the epoch")
    config = result["config"]
    axes.set(ylabel="training loss (cross-entropy)")
    epochs_axis(axes)
    axes.set_title(
        f"{Path(config['model']).name.split('.')[0]}, LoRA r = {config['rank']}, initialisation: {config['init']}",
        fontsize=10,
    )
    plain_log(axes)
    tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    points, name, unit = _followed(result)
    if points:
        right = axes.twinx()
        right.plot(list(points), list(points.values()), "s-", color=ORANGE, markersize=4, label=name)
        right.set_ylabel(f"{name}{unit}", color=ORANGE)
        if unit:
            right.set_ylim(0, 100)
        right.spines[["top"]].set_visible(False)
        handles, labels = [a + b for a, b in zip((handles, labels), right.get_legend_handles_labels(), strict=True)]
    axes.legend(handles, labels, frameon=False, loc="center left" if points else "best")


def _followed(result: dict[str, Any]) -> tuple[dict[float, float], str, str]:
    """Epoch to what was measured there, its name, and its unit."""
    if found := result.get("perplexity_per_step"):
        every = by_epoch.steps_per_epoch(result)
        return {int(step) / every: value for step, value in found.items()}, "held-out perplexity", ""
    split = "validation" if "validation" in result else "test"
    return {int(k): 100 * v for k, v in result.get("top1_per_epoch", {}).items()}, f"{split} top-1", " (%)"


def _draw_boundaries(axes: Axes, report: dict[str, Any]) -> None:
    depth = np.arange(1, len(report["layers"]) + 1)
    for key, colour, label in (("match", GREEN, "sign as the reference's"), ("inside", ORANGE, "inside the margin")):
        before = [100 * layer["before"][key] for layer in report["layers"]]
        after = [100 * layer["after"][key] for layer in report["layers"]]
        axes.plot(depth, before, "--", color=colour, linewidth=1.2)
        axes.plot(depth, after, "o-", color=colour, markersize=4, label=label)
    axes.plot([], [], "--", color=GREY, label="before matching")
    axes.set(xlabel="matched layer, in order of depth", ylabel="share of hidden units (%)", ylim=(0, 103))
    axes.set_title(f"boundaries matched to {shown(report['reference'])} in {report['seconds']:.0f} s", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    axes.legend(frameon=False, loc="lower left")


def draw_information_loss(result: dict[str, Any]) -> Figure:
    """Heat maps, depth by kind of layer: information loss before and after the initialisation, and this rank's best."""
    before, after = (result["information_loss"][k] for k in ("before", "after"))
    kinds = [kind["name"] for kind in after["kinds"]]
    panels = {
        f"fresh adapter: {before['overall']['loss']:.3f}": by_depth(before, kinds, "loss"),
        f"{result['config']['init']}: {after['overall']['loss']:.3f}": by_depth(after, kinds, "loss"),
        f"best of its rank: {after['overall']['optimum']:.3f}": by_depth(after, kinds, "optimum"),
    }
    depth = len(next(iter(panels.values())))
    figure = Figure(figsize=(2.2 + 0.75 * len(kinds) * 3, 1.6 + 0.32 * depth), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        image = heat_map(axis, values, kinds, title)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes[0].set(ylabel="depth", yticks=range(depth), yticklabels=range(1, depth + 1))
    figure.colorbar(image, ax=axes, label="information loss")
    config = result["config"]
    task = f"{config.get('task', 'instructions')}{stand_in(result['data']['train']['source'])}"
    figure.suptitle(f"share of the gradient out of reach, {task}, r = {config['rank']}", fontweight="bold")
    return figure
