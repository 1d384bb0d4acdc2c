"""ABMConfig: the settings of the boundary matching."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral

from abm_vision.abm.arguments import check_choice, check_real, check_seed, check_whole

FITS = ("end_to_end", "local")


@dataclass(frozen=True)
class ABMConfig:
    """How activation boundaries are matched.

    Args:
        margin: m of Eq. (22), arXiv:2511.19145, in the unit that `margin_unit` names; >= 0.
        margin_unit: "absolute" (units of the pre-activation) or "relative" (multiples of each layer's root mean
            square pre-activation in the reference, on the first batch).
        steps: optimiser steps.
        learning_rate: of AdamW on the adapter's weights at the first step; it falls linearly towards zero.
        samples: calibration samples; whole batches of the loader are taken until there are as many.
        batch_size: samples in a step. The loader's batches are cut to it, never joined: signs and final figures are
            computed on whole batches, which is faster.
        layers: which boundaries of each stack: "all", the last n, or a list of module names.
        layer_weights: "quadratic" (w_l^2 = ((l + 1) / L)^2 over the matched layers of a stack) or "uniform".
        fit: "end_to_end" (AdamW on all factors before the last boundary) or "local" (every boundary on its own, in
            closed form, on the first batch: B of the projection in front of it alone; steps, learning_rate and
            batch_size do not apply).
        seed: of torch, Python and NumPy during the initialisation, for what the loader draws.
    """

    margin: float = 0.5
    margin_unit: str = "absolute"
    steps: int = 20
    learning_rate: float = 1e-3
    samples: int = 128
    batch_size: int = 8
    layers: str | int | Sequence[str] = "all"
    layer_weights: str = "quadratic"
    fit: str = "end_to_end"
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("margin_unit", self.margin_unit, ("absolute", "relative"))
        check_choice("layer_weights", self.layer_weights, ("quadratic", "uniform"))
        check_choice("fit", self.fit, FITS)
        check_real("margin", self.margin, 0)
        check_real("learning_rate", self.learning_rate, 0, above=True)
        for field in ("steps", "samples", "batch_size"):
            check_whole(field, getattr(self, field), 1)
        check_seed(self.seed)
        self._settle_layers()

    def _settle_layers(self) -> None:
        """A number as int, names as a tuple: both can be written as JSON."""
        if isinstance(self.layers, str):
            check_choice("layers", self.layers, ("all",), hint="a number of last layers, or a list of module names")
            return
        number = isinstance(self.layers, Integral)
        if number and self.layers < 1 or not number and not isinstance(self.layers, Iterable):
            raise ValueError(f"layers is {self.layers}; it must be 1 or more, 'all', or a list of module names")
        if not number and not all(isinstance(name, str) for name in self.layers):
            raise ValueError(f"layers is {self.layers}; a list must hold module names")
        object.__setattr__(self, "layers", int(self.layers) if number else tuple(self.layers))


@dataclass(frozen=True)
class AlignConfig:
    """The settings of the aligned start.

    Args:
        samples: labelled calibration samples; whole batches of the loader are taken until there are as many.
        norm: length of every row of A.
        size: length of every column of B, if the boundaries allow it.
        match: the least share of hidden units that must stay on the pretrained model's side, in (0, 1]; B is
            halved until they do.
        seed: of torch, Python and NumPy during the initialisation, for what the loader draws.
    """

    samples: int = 128
    norm: float = 2.0
    size: float = 0.01
    match: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, 1)
        for field in ("norm", "size", "match"):
            check_real(field, getattr(self, field), 0, above=True)
        if self.match > 1:
            raise ValueError(f"match is {self.match}; it must lie in (0, 1]")
        check_seed(self.seed)
