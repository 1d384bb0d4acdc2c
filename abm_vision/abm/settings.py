"""Settings of initialisations: InitConfig, which all have, ABMConfig and AlignConfig. No torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from abm_vision.abm.arguments import check_choice, check_real, check_seed, check_whole

FITS = ("end_to_end", "local")


def flag(default: Any, text: str, **extra: Any) -> Any:
    """A field that is a flag of the command line, too.

    Args:
        default: of the field.
        text: its help.
        extra: `choices`; `name`, if the flag has another than the field; `parse`, which makes a value of the flag's
            text, for a field that is no bool, int, float or str.
    """
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What every initialisation may be given.

    Args:
        samples: calibration samples; whole batches of the loader are taken until there are as many.
        seed: of torch, Python and NumPy during the initialisation, for what the loader draws.

    Raises:
        ValueError: a field is out of its range.
    """

    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("samples", self.samples, 1)
        check_seed(self.seed)


def _layers(text: str) -> str | int | list[str]:
    """`ABMConfig.layers` of a flag: "all", "6", or names with commas between."""
    return text if text == "all" else int(text) if text.isdigit() else text.split(",")


@dataclass(frozen=True)
class ABMConfig(InitConfig):
    """How activation boundaries are matched.

    Args:
        margin: m of Eq. (22), arXiv:2511.19145, in the unit that `margin_unit` names; >= 0.
        margin_unit: "absolute" (units of the pre-activation) or "relative" (multiples of each layer's root mean
            square pre-activation in the reference, on the first batch).
        steps: optimiser steps.
        learning_rate: of AdamW on the adapter's weights in the middle of the steps, to which it rises and from which
            it falls linearly.
        batch_size: samples in a step. The loader's batches are cut to it, never joined: signs and final figures are
            computed on whole batches, which is faster.
        tokens: of text, the most that are taken, padding included, so that long sequences cost no more than short
            ones; one sample is always taken.
        layers: which boundaries of each stack: "all", the last n, or a list of module names.
        layer_weights: "quadratic" (w_l^2 = ((l + 1) / L)^2 over the matched layers of a stack) or "uniform".
        fit: "end_to_end" (AdamW on all factors before the last boundary) or "local" (every boundary on its own, in
            closed form, on the first batch: B of the projection in front of it alone; steps, learning_rate and
            batch_size do not apply).

    `seed` is as in `InitConfig`. Of `samples` no more are taken than the steps see: steps * batch_size.
    """

    margin: float = flag(0.5, "margin of the boundary loss")
    margin_unit: str = flag("absolute", "unit of the margin", choices=("absolute", "relative"))
    steps: int = flag(9, "optimiser steps of the matching")
    learning_rate: float = flag(3e-4, "highest learning rate of the matching", name="lr")
    batch_size: int = flag(4, "samples in a step of the matching")
    tokens: int = flag(2048, "of text, the most tokens that the matching takes, with padding", name="max_tokens")
    layers: str | int | Sequence[str] = flag(
        "all", "all, the number of last layers to match, or activation modules with commas between", parse=_layers
    )
    layer_weights: str = flag("quadratic", "weight of a layer by its depth", choices=("quadratic", "uniform"))
    fit: str = flag("end_to_end", "all layers together by AdamW, or each on its own in closed form", choices=FITS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("margin_unit", self.margin_unit, ("absolute", "relative"))
        check_choice("layer_weights", self.layer_weights, ("quadratic", "uniform"))
        check_choice("fit", self.fit, FITS)
        check_real("margin", self.margin, 0)
        check_real("learning_rate", self.learning_rate, 0, above=True)
        for name in ("steps", "batch_size", "tokens"):
            check_whole(name, getattr(self, name), 1)
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
class AlignConfig(InitConfig):
    """The settings of the aligned initialisation, which takes labelled batches.

    Args:
        norm: length of every row of A.
        size: length of every column of B, if the boundaries allow it.
        match: the least share of hidden units that must stay on the pretrained model's side, in (0, 1]; B is
            halved until they do.

    `samples` and `seed` are as in `InitConfig`.
    """

    norm: float = flag(2.0, "for init abm_aligned: length of the rows of A")
    size: float = flag(0.01, "for init abm_aligned: length of the columns of B, if boundaries allow it")
    match: float = flag(0.99, "for init abm_aligned: least share of hidden units that keep their side")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("norm", "size", "match"):
            check_real(name, getattr(self, name), 0, above=True)
        if self.match > 1:
            raise ValueError(f"match is {self.match}; it must lie in (0, 1]")
