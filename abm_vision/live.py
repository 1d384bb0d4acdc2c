"""LivePlot: the loss of a run in a notebook, drawn while it trains."""

from __future__ import annotations

import time
from io import BytesIO

from IPython.display import DisplayHandle, Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from abm_vision.analysis.figures import BLUE, OKABE_ITO


class LivePlot:
    """A log (see `abm_vision.runs.log`) that draws what it is told below the cell: `run(config, log=LivePlot())`.

    Losses are on the left; whatever else is followed, but the learning rate, is on the right.

    Args:
        every: seconds between two drawings of what comes with every step; a test's figure is drawn at once, and `draw`
            shows everything.
    """

    def __init__(self, every: float = 1.0) -> None:
        self.every = every
        self.figures: dict[str, tuple[list[int], list[float]]] = {}
        self._handle: DisplayHandle | None = None
        self._drawn = 0.0

    def __call__(self, name: str, value: float, step: int) -> None:
        """Take a value; draw if it is time."""
        steps, values = self.figures.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)
        if not name.startswith("train/") or time.monotonic() - self._drawn >= self.every:
            self.draw()

    def draw(self) -> None:
        """Show everything told so far."""
        self._drawn = time.monotonic()
        drawn = BytesIO()  # a bare Figure is shown as a picture only where pyplot has been set up for the notebook
        self.figure().savefig(drawn, format="png", dpi=80)
        picture = Image(drawn.getvalue())
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)

    def figure(self) -> Figure:
        """The plot as it is now."""
        losses = [name for name in self.figures if name.endswith("loss")]
        others = [name for name in self.figures if not name.endswith(("loss", "lr"))]
        panels = [names for names in (losses, others) if names]
        figure = Figure(figsize=(5.2 * max(1, len(panels)), 3.2), layout="constrained")
        for axes, names in zip(figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=False):
            _lines(axes, {name: self.figures[name] for name in names})
        return figure


def _lines(axes: Axes, figures: dict[str, tuple[list[int], list[float]]]) -> None:
    for (name, (steps, values)), colour in zip(figures.items(), (BLUE, *OKABE_ITO), strict=False):
        axes.plot(steps, values, color=colour, label=f"{name}: {values[-1]:.3f}")
    axes.set(xlabel="step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
