"""The figures of the documents, drawn from the committed result files: `python benchmarks/figures.py`."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from tables_costs import read

from abm_vision.drawing import BLUE, GREY, ORANGE

DOCS = Path(__file__).parent.parent / "docs"
INK = "#808080"  # legible on white and on black
SHOWN = {"full": ("full fine-tuning", GREY), "peft": ("LoRA, peft", ORANGE), "ours": ("LoRA, here", BLUE)}


def step() -> Figure:
    """Extra time of a training step over the frozen model, by size and precision."""
    content = read("training_step")
    figure = Figure(figsize=(5.2, 2.7), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(SHOWN)
    for k, (variant, (words, colour)) in enumerate(SHOWN.items()):
        ratios = [row["variants"][variant]["ratio_to_floor"] for row in content["rows"]]
        places = [place + (k - 1) * width for place in range(len(ratios))]
        bars = axes.bar(places, [100 * (ratio - 1) for ratio in ratios], width * 0.92, color=colour, label=words)
        axes.bar_label(bars, [f"+{100 * (ratio - 1):.0f}" for ratio in ratios], color=INK, fontsize=9, padding=2)
    names = [f"{r['image_size']} px\n{r['dtype'].removeprefix('torch.')}" for r in content["rows"]]
    axes.set_xticks(range(len(names)), names, fontsize=9)
    axes.set_yticks([])
    title = "extra time of a training step (%), ViT-S/14, 2 CPU cores,\n"
    title += "over one with a frozen backbone and gradients to its input"
    axes.set_title(title, color=INK, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, length=0)
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=9, ncols=3, columnspacing=1.2, loc="upper left", bbox_to_anchor=(0, 1)
    )
    axes.margins(y=0.35)
    return figure


if __name__ == "__main__":
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "abm-lora"}):
        step().savefig(DOCS / "step.svg", transparent=True, metadata={"Date": None})
