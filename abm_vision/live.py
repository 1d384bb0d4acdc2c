"""LivePlot: draws the losses of a run in a notebook during training."""

from __future__ import annotations

import time
from io import BytesIO
from itertools import cycle
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from abm_vision.drawing import BLUE, COLUMN, GREEN, OKABE_ITO, ORANGE, tidy

if TYPE_CHECKING:
    from IPython.display import DisplayHandle


class LivePlot:
    """A log (see `abm_vision.runs.log`) that draws its values below the cell: `run(config, log=LivePlot())`.

    Losses are on the left, all other values except the learning rate on the right.

    Args:
        every: seconds between two drawings of values that come with every step; values of a test are drawn at once.
    """

    def __init__(self, every: float = 1.0) -> None:
        self.every = every
        self.figures: dict[str, tuple[list[int], list[float]]] = {}
        self._handle: DisplayHandle | None = None
        self._drawn = 0.0

    def __call__(self, name: str, value: float, step: int) -> None:
        """Record a value, and draw if it is time."""
        steps, values = self.figures.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
        if not name.startswith("train/") or time.monotonic() - self._drawn >= self.every:
            self.draw()

    def draw(self) -> None:
        """Draw all values recorded so far."""
        from IPython.display import Image, display  # a notebook has it

        self._drawn = time.monotonic()
        drawn = BytesIO()  # the notebook shows a bare Figure as a picture only if pyplot has been set up for it
        self.figure().savefig(drawn, format="png", dpi=80)
        picture = Image(drawn.getvalue())
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)

    def figure(self) -> Figure:
        """Return the current plot."""
        losses = [name for name in self.figures if name.endswith("loss")]
        others = [name for name in self.figures if not name.endswith(("loss", "lr"))]
        panels = [names for names in (losses, others) if names]
        figure = Figure(figsize=(1.4 * COLUMN * max(1, len(panels)), 3), layout="constrained")
        for axes, names in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
            _lines(axes, {name: self.figures[name] for name in names})
        return figure


def _lines(axes: Axes, figures: dict[str, tuple[list[int], list[float]]]) -> None:
    colours = cycle(dict.fromkeys((BLUE, ORANGE, GREEN, *OKABE_ITO)))
    for (name, (steps, values)), colour in zip(figures.items(), colours, strict=False):
        axes.plot(steps, values, color=colour, label=f"{name}: {values[-1]:.3f}")
    axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    tidy(axes)
    axes.legend(frameon=False, fontsize=9)
