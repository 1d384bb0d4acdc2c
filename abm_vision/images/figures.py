"""Figures of an evaluation: which class is taken for which, and a contact sheet of mistakes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from abm_vision.drawing import shown

COLUMNS, THUMBNAIL = 6, 200  # pictures in a row of the sheet; their longer side in pixels
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


def draw_mistakes(images: Iterable[NDArray[np.uint8]], captions: Sequence[str]) -> Figure:
    """Pictures (height, width, 3), each with its caption, in rows."""
    columns = min(COLUMNS, len(captions))
    rows = -(-len(captions) // columns)
    figure = Figure(figsize=(2.3 * columns, 2.7 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, image, caption in zip(panels, images, captions, strict=False):
        picture = Image.fromarray(image)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        axes.imshow(picture)
        axes.set_title(shown(caption), fontsize=8)
    return figure
