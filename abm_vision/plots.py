"""Every figure, drawn from result records alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abm_vision.abm.files import write_atomically

# Okabe and Ito's palette: told apart by colour-blind readers too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"


def save_curves(result: dict[str, Any], path: Path) -> None:
    """Draw a run and write it as PNG."""
    write_atomically(path, lambda beside: draw_curves(result).savefig(beside, dpi=150))


def draw_curves(result: dict[str, Any]) -> Figure:
    """Training loss, with test accuracy where it was followed; beside it what the matching did to every layer."""
    config, test = result["config"], result["test"]
    figure = Figure(figsize=(11 if result["abm"] else 7, 4.2), layout="constrained")
    panels = figure.subplots(
        1, 2 if result["abm"] else 1, squeeze=False, width_ratios=[3, 2] if result["abm"] else [1]
    )[0]
    source = result["data"]["test"]["source"]
    figure.suptitle(
        f"{config['task']}{' (rendered data)' if source == 'rendered' else ''}: {100 * test['top1']:.1f} % top-1 of "
        f"{test['count']:,} test images",
        fontweight="bold",
    )
    _draw_losses(panels[0], result)
    if result["abm"]:
        _draw_boundaries(panels[1], result["abm"])
    return figure


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
    _tidy(axes)
    handles, labels = axes.get_legend_handles_labels()
    if result["top1_per_epoch"]:
        right = axes.twinx()
        points = {int(k): 100 * v for k, v in result["top1_per_epoch"].items()}
        right.plot(list(points), list(points.values()), "s-", color=ORANGE, markersize=4, label="test top-1")
        right.set_ylabel("test top-1 (%)", color=ORANGE)
        right.set_ylim(0, 100)
        right.spines[["top"]].set_visible(False)
        handles, labels = [a + b for a, b in zip((handles, labels), right.get_legend_handles_labels(), strict=True)]
    axes.legend(handles, labels, frameon=False, loc="center left" if result["top1_per_epoch"] else "best")


def _draw_boundaries(axes: Axes, report: dict[str, Any]) -> None:
    depth = np.arange(1, len(report["layers"]) + 1)
    for key, colour, label in (("match", GREEN, "sign as the reference's"), ("inside", ORANGE, "inside the margin")):
        before = [100 * layer["before"][key] for layer in report["layers"]]
        after = [100 * layer["after"][key] for layer in report["layers"]]
        axes.plot(depth, before, "--", color=colour, linewidth=1.2)
        axes.plot(depth, after, "o-", color=colour, markersize=4, label=label)
    axes.plot([], [], "--", color=GREY, label="before matching")
    axes.set(xlabel="matched layer, in order of depth", ylabel="share of hidden units (%)", ylim=(0, 103))
    axes.set_title(f"boundaries matched to {report['reference']} in {report['seconds']:.0f} s", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _tidy(axes)
    axes.legend(frameon=False, loc="lower left")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
