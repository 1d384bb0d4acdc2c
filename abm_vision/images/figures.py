"""Figures of an evaluation: which class is taken for which, and a contact sheet of mistakes."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from abm_vision.drawing import COLUMN, DPI, GREEN, ORANGE, shown

# The sheet of pictures, in pixels: a row of six is as wide as a page.
COLUMNS, MIN_COLUMNS = 6, 4
CELL, CAPTION, GAP, EDGE = int(2 * COLUMN * DPI) // COLUMNS, 52, 10, 4
LINE, LETTER = 26, 11  # a line and a letter of the title
LETTERS = 19  # in a line of a caption
FRAMES = [[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in (ORANGE, GREEN)]  # wrong, right
NUMBERED = 20  # classes up to which every cell has its number


def draw_confusion(matrix: NDArray[np.int64], classes: Sequence[str]) -> Figure:
    """Shares of every class (row) by what it was taken for (column), with the numbers of images where there is room."""
    size = min(4 + 0.45 * len(classes), 24)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="cividis")
    names = [shown(name if len(name) <= 24 else f"{name[:23]}…") for name in classes]
    small = 9 if len(classes) <= NUMBERED else 5
    axes.set_xticks(range(len(classes)), names, rotation=45, ha="right", fontsize=small)
    axes.set_yticks(range(len(classes)), names, fontsize=small)
    axes.set(xlabel="predicted", ylabel="class")
    if len(classes) <= NUMBERED:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            colour = "black" if shares[i, j] > 0.6 else "white"
            axes.text(j, i, str(matrix[i, j]), ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, label="share of the class's images")
    return figure


def draw_sheet(
    images: Iterable[NDArray[np.uint8]], captions: Sequence[str], title: str = "", right: Sequence[bool] | None = None
) -> Figure:
    """Pictures (height, width, 3) in rows, each below its caption of one or two lines; framed by whether it is right.

    One image of pixels: a panel a picture takes seconds.
    """
    columns = min(COLUMNS, len(captions))
    rows, across = -(-len(captions) // columns), max(columns, MIN_COLUMNS) * CELL
    lines = [line for whole in title.split("\n") for line in textwrap.wrap(whole, across // LETTER)]
    above, high = LINE * len(lines), CELL + CAPTION
    canvas = np.full((above + rows * high, across, 3), 255, dtype=np.uint8)
    figure = Figure(figsize=(canvas.shape[1] / DPI, canvas.shape[0] / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.text(GAP, GAP, shown("\n".join(lines)), fontsize=9, va="top")
    for k, (image, caption) in enumerate(zip(images, captions, strict=True)):
        picture = _fitted(image)
        (height, width), side = picture.shape[:2], CELL - 2 * GAP
        x, y = k % columns * CELL + GAP + (side - width) // 2, above + k // columns * high + CAPTION
        if right is not None:
            canvas[y - EDGE : y + height + EDGE, x - EDGE : x + width + EDGE] = FRAMES[right[k]]
        canvas[y : y + height, x : x + width] = picture
        words = "\n".join(line if len(line) <= LETTERS else f"{line[: LETTERS - 1]}…" for line in caption.split("\n"))
        axes.text(x + width / 2, y - 2 * EDGE, shown(words), fontsize=7, ha="center", va="bottom")
    axes.imshow(canvas, interpolation="none", aspect="auto")
    return figure


def _fitted(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As large as a cell allows; small ones with their pixels to be seen."""
    side = CELL - 2 * GAP
    scale = side / max(image.shape[:2])
    size = [max(1, round(scale * length)) for length in image.shape[1::-1]]
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize(size, how))
