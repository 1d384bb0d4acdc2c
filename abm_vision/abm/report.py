"""ABMReport: what a boundary matching did, printable and as plain numbers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from abm_vision.abm.reference import Calibration
from abm_vision.abm.settings import ABMConfig


@dataclass(frozen=True)
class BoundaryState:
    """One layer's figures at one moment, on the calibration samples.

    Args:
        loss: mean of [max(0, m - tau z)]^2, units of the pre-activation squared, before layer weighting.
        match: share of elements on the reference's side of the boundary, in [0, 1].
        inside: share of elements with tau z < m, in [0, 1].
    """

    loss: float
    match: float
    inside: float


@dataclass(frozen=True)
class LayerReport:
    """One matched layer: its module name, stack, weight w_l^2, margin m in units of z, and both states."""

    name: str
    stack: str
    weight: float
    margin: float
    before: BoundaryState
    after: BoundaryState


@dataclass(frozen=True)
class ABMReport:
    """The outcome of `initialize_lora_abm_weights`.

    Args:
        layers: the matched layers in the order in which they fire.
        before: the same figures overall; the loss is Eq. (22), arXiv:2511.19145 (weighted mean over layers), the
            shares are averaged over layers.
        after: likewise.
        kept: the share of the way from the first factors to those of the last step that was kept, so that the loss is
            not above where it began: 1, 1/2, 1/4, 1/8 or 0.
        loss_per_step: the loss of each optimiser step on its own batch; of a local fit, before each Newton step and
            after the last, on the layers' recorded inputs.
        seconds: wall time of the whole call.
        samples: calibration samples used. `config.samples` says how many were asked for.
        reference: "pretrained", "adapter 'NAME'" or "another CLASS".
        config: the settings.
    """

    layers: tuple[LayerReport, ...]
    before: BoundaryState
    after: BoundaryState
    kept: float
    loss_per_step: tuple[float, ...]
    seconds: float
    samples: int
    reference: str
    config: ABMConfig

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, strings and numbers, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))  # tuples become lists

    def summary(self) -> str:
        """One line."""
        how = "fitted layer by layer" if self.config.fit == "local" else f"{self.config.steps} steps"
        taken = f"{self.samples} samples, {how}, {self.seconds:.1f} s"
        if not self.kept:
            return (
                f"{taken}: nothing kept, as every share of the way tried raises the boundary loss; the adapter is as "
                "it was (fresh: peft's default, B = 0)"
            )
        fewer = 1 - self.after.inside / self.before.inside if self.before.inside else 0.0
        return (
            f"{taken}: {100 * abs(fewer):.1f} % {'fewer' if fewer >= 0 else 'more'} units inside the margin, "
            f"{100 * self.after.match:.1f} % keep their side"
            f"{'' if self.kept == 1 else f' ({self.kept:g} of the way kept: further the loss rises)'}"
        )

    def __str__(self) -> str:
        width = max(len(name) for name in (OVERALL, *(layer.name for layer in self.layers)))
        head = (
            f"ABM: {len(self.layers)} layers matched to {self.reference}"
            f"{', each on its own' if self.config.fit == 'local' else f' in {self.config.steps} steps'}, "
            f"{self.samples} of {self.config.samples} samples, {self.kept:g} of the way kept, {self.seconds:.1f} s\n"
            f"{'layer':<{width}} {'w^2':>5} {'margin':>6}   {'loss':^17}  {'match rate':^15}  {'inside margin':^15}"
        )
        rows = [_row(f"{r.name:<{width}} {r.weight:5.3f} {r.margin:6.3f}", r.before, r.after) for r in self.layers]
        return "\n".join([head, *rows, _row(f"{OVERALL:<{width}}{'':13}", self.before, self.after)])


def layer_reports(
    calibration: Calibration, before: Tensor, after: Tensor
) -> tuple[tuple[LayerReport, ...], BoundaryState, BoundaryState]:
    """Every layer's report, and the state overall before and after, from two (layers, 3) tables of figures."""
    layers = tuple(
        LayerReport(layer.name, layer.stack, layer.weight, layer.margin, BoundaryState(*b), BoundaryState(*a))
        for layer, b, a in zip(calibration.boundaries, before.tolist(), after.tolist(), strict=True)
    )
    overall = [[calibration.loss(s).item(), *s[:, 1:].mean(0).tolist()] for s in (before, after)]
    return layers, BoundaryState(*overall[0]), BoundaryState(*overall[1])


OVERALL = "all (weighted loss)"


def _row(left: str, before: BoundaryState, after: BoundaryState) -> str:
    return (
        f"{left}   {before.loss:.5f} > {after.loss:.5f}  "
        f"{before.match:.4f} > {after.match:.4f}  {before.inside:.4f} > {after.inside:.4f}"
    )
