"""What all figures have in common: colours, axes, and the map of an information loss."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.font_manager import get_font_names
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from abm_vision.abm.files import write_atomically
from abm_vision.abm.names import layer_kind
from abm_vision.initializers import BASELINE, INITIALIZERS

# Okabe and Ito's palette: told apart by colour-blind readers too. Its yellow is left out, too faint on white.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"
OKABE_ITO = (GREEN, "#CC79A7", "#E69F00", BLUE, "#56B4E9", ORANGE, "#000000")
MARKERS, LINES = "^vDPos", ("-", "--", ":", "-.")
DPI = 150  # of written pictures
COLUMN = 3.4  # inches: a panel is as wide as a column of a paper, two are as wide as a page


# matplotlib's own font, and those of other scripts that may be installed: each letter comes from the first that has it.
FONTS = """
    DejaVu Sans, Noto Sans CJK SC, Noto Sans CJK JP, Noto Sans CJK KR, WenQuanYi Zen Hei, WenQuanYi Micro Hei,
    PingFang SC, Hiragino Sans, Apple SD Gothic Neo, Microsoft YaHei, Yu Gothic, Malgun Gothic,
    Noto Sans Devanagari, Noto Sans Thai
"""


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the path's suffix, names of classes in their own script where a font has it.

    Warns:
        UserWarning: once, if no font has letters of the figure, which are boxes then.
    """
    installed = set(get_font_names())
    fonts = [name for name in map(str.strip, FONTS.split(",")) if name in installed]
    for text in figure.findobj(Text):
        text.set_fontfamily(fonts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_atomically(path, lambda beside: figure.savefig(beside, dpi=DPI))
    others = [one for one in caught if not str(one.message).startswith("Glyph")]  # matplotlib's, one a letter
    for one in others:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if len(others) < len(caught):
        warnings.warn(f"{path.name}: no installed font has some of its letters: install Noto Sans CJK", stacklevel=2)


def style_of(init: str) -> dict[str, str]:
    """Colour and marker of an initialisation, the same in every figure: grey for the default, by its row for others."""
    if init == BASELINE:
        return {"color": GREY, "marker": "X"}
    place = list(INITIALIZERS).index(init) - 1
    return {"color": OKABE_ITO[place % len(OKABE_ITO)], "marker": MARKERS[place % len(MARKERS)]}


def styles_of(inits: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Style of every method, given its initialisation: methods of the same one differ in their lines."""
    seen: Counter[str] = Counter()
    styles = {}
    for method, init in inits.items():
        styles[method] = {**style_of(init), "linestyle": LINES[seen[init] % len(LINES)]}
        seen[init] += 1
    return styles


def panels_of(figure: FigureBase, count: int, columns: int = 2, **options: Any) -> list[Axes]:
    """So many panels in rows; what is left of the last row stays empty."""
    columns = min(columns, count)
    grid = list(figure.subplots(-(-count // columns), columns, squeeze=False, **options).flat)
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[max(0, count - columns) : count]:  # with shared axes the removed ones had the numbers
        axes.tick_params(labelbottom=True)
    return grid[:count]


def shown(name: str) -> str:
    """A name as it is: between two dollar signs matplotlib would read a formula."""
    return name.replace("$", r"\$")


def tidy(axes: Axes) -> None:
    """No frame above and to the right, faint lines across, and letters that fit a column."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)


def epochs_axis(axes: Axes) -> None:
    """From 0 to the end of the last epoch that is drawn, with ticks at whole ones; of a small part to its end."""
    last = axes.dataLim.xmax
    whole = last >= 0.5  # where the mean of a single epoch is drawn
    axes.set(xlabel="epoch", xlim=(0, np.ceil(last) + 0.1 if whole else 1.05 * last))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=whole))


def plain_log(axes: Axes) -> None:
    """Ticks such as 0.5, not 5 x 10^-1."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 3 * low else MaxNLocator(4))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def by_depth(report: dict[str, Any], kinds: list[str], field: str) -> np.ndarray:
    """A field of an information loss: (depth, kinds of layer); NaN where a block has no such layer."""
    columns = [[layer[field] for layer in report["layers"] if layer_kind(layer["name"]) == kind] for kind in kinds]
    values = np.full((max(map(len, columns)), len(kinds)), np.nan)
    for column, found in enumerate(columns):
        values[: len(found), column] = found
    return values


def heat_map(axes: Axes, values: np.ndarray, kinds: list[str], title: str) -> Any:
    """Information loss by depth and kind of layer. Returns what a colour bar is made of."""
    image = axes.imshow(values, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right", fontsize=8)
    axes.set_title(shown(title), fontsize=10)
    return image
