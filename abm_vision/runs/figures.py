"""Figures of one run: its training, and the information loss of its initialisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    tidy,
)
from abm_vision.runs import epochs as by_epoch
from abm_vision.runs.view import stand_in


def draw_training(result: dict[str, Any], title: str) -> Figure:
    """Training loss; the score where it was followed; what the matching did to every layer."""
    config, matched = result["config"], result["abm"]
    points, name = _followed(result)
    count = 1 + bool(points) + bool(matched)
    figure = Figure(figsize=(COLUMN * min(2, count) + (count == 1), 2.9 * -(-count // 2) + 0.6), layout="constrained")
    panels = iter(panels_of(figure, count))
    model = Path(config["model"]).name.split(".")[0]
    words = f"{model}, LoRA r = {config['rank']}, initialisation: {config['init']}"
    figure.suptitle(f"{title}\n{words}", fontsize=10, wrap=True)
    _draw_losses(next(panels), result)
    if points:
        axes = next(panels)
        axes.plot(list(points), list(points.values()), **style_of(config["init"]), markersize=5)
        axes.set(ylabel=name)
        epochs_axis(axes)
        tidy(axes)
    if matched:
        _draw_boundaries(next(panels), matched, style_of(config["init"])["color"])
    return figure


def _draw_losses(axes: Axes, result: dict[str, Any]) -> None:
    losses, style = np.array(result["loss_per_step"]), style_of(result["config"]["init"])
    epochs = np.arange(1, len(losses) + 1) / by_epoch.steps_per_epoch(result)
    axes.semilogy(epochs, losses, color=style["color"], alpha=0.35, linewidth=1, label="each step")
    means = by_epoch.mean_losses(result)
    axes.semilogy(by_epoch.middles(result), means, **style, markersize=5, label="mean of the epoch")
    axes.set(ylabel="training loss (cross-entropy)")
    epochs_axis(axes)
    plain_log(axes)
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)


def _followed(result: dict[str, Any]) -> tuple[dict[float, float], str]:
    """Epoch to what was measured there, and its name with its unit."""
    if found := result.get("perplexity_per_step"):
        every = by_epoch.steps_per_epoch(result)
        return {int(step) / every: value for step, value in found.items()}, "held-out perplexity"
    split = "validation" if "validation" in result else "test"
    return {int(k): 100 * v for k, v in result.get("top1_per_epoch", {}).items()}, f"{split} top-1 (%)"


def _draw_boundaries(axes: Axes, report: dict[str, Any], colour: str) -> None:
    """Before the matching in wide grey, which what is after it does not hide."""
    depth = np.arange(1, len(report["layers"]) + 1)
    for key, line, mark, words in (("match", "-", "o", "side kept"), ("inside", "--", "s", "inside the margin")):
        before, after = ([100 * layer[moment][key] for layer in report["layers"]] for moment in ("before", "after"))
        axes.plot(depth, before, line, color=GREY, alpha=0.6, linewidth=4, label=f"{words}, before")
        axes.plot(depth, after, line, color=colour, marker=mark, markersize=4, linewidth=1.2, label=f"{words}, after")
    axes.set(xlabel="matched layer, in order of depth", ylabel="share of hidden units (%)", ylim=(0, 103))
    axes.set_title(f"boundaries matched to {shown(report['reference'])} in {report['seconds']:.0f} s", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    tidy(axes)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.22))


def draw_information_loss(result: dict[str, Any]) -> Figure:
    """Heat maps, depth by kind of layer: information loss before and after the initialisation, and this rank's best."""
    before, after = (result["information_loss"][k] for k in ("before", "after"))
    kinds = [kind["name"] for kind in after["kinds"]]
    panels = {
        f"fresh adapter\n{before['overall']['loss']:.3f}": by_depth(before, kinds, "loss"),
        f"{result['config']['init']}\n{after['overall']['loss']:.3f}": by_depth(after, kinds, "loss"),
        f"best of its rank\n{after['overall']['optimum']:.3f}": by_depth(after, kinds, "optimum"),
    }
    depth = len(next(iter(panels.values())))
    figure = Figure(figsize=(max(2 * COLUMN, 1.5 + 1.32 * len(kinds)), 1.9 + 0.22 * depth), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        image = heat_map(axis, values, kinds, title)
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "black" if value > 0.6 else "white"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes[0].set(ylabel="block", yticks=range(depth), yticklabels=range(1, depth + 1))
    figure.colorbar(image, ax=axes, label="information loss")
    config = result["config"]
    task = f"{config.get('task', 'instructions')}{stand_in(result['data']['train']['source'])}"
    figure.suptitle(f"share of the gradient out of reach, {task}, r = {config['rank']}", fontsize=10)
    return figure
