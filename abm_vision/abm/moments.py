"""Second moments of what goes into layers, added up over batches, and the principal directions that follow from them.

For a layer's inputs x_1 .. x_n, (in,), with mean m, the covariance is sum (x_i - m)(x_i - m)^T / (n - 1). Its leading
eigenvectors are the leading right singular vectors of all centred inputs at once, which need not be kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abm_vision.abm.hooks import Args, hooked

InputsOf = Callable[[str, Any, Tensor], Tensor]
HELD = 2**31  # bytes of moments that are added up at a time; layers beyond take further passes over the batches


@dataclass
class Moments:
    """Sums over a layer's inputs x, (in,), float32.

    Attributes:
        centre: (in,), a point near their mean, about which sums lose no digits.
        count: n.
        first: sum (x - centre), (in,).
        second: sum (x - centre)(x - centre)^T, (in, in).
    """

    centre: Tensor
    count: int
    first: Tensor
    second: Tensor

    @classmethod
    def about(cls, inputs: Tensor) -> Moments:
        """Of no inputs yet, about the mean of some, (n, in)."""
        width = inputs.shape[-1]
        return cls(inputs.mean(0), 0, inputs.new_zeros(width), inputs.new_zeros(width, width))

    def add(self, inputs: Tensor) -> None:
        """Count inputs (n, in), too."""
        shifted = inputs - self.centre
        self.count += len(inputs)
        self.first += shifted.sum(0)
        self.second.addmm_(shifted.T, shifted)

    def principal(self, k: int) -> tuple[Tensor, Tensor]:
        """The k leading directions, (k, in), each with its largest entry positive, and their shares of the variance."""
        scatter = self.second - torch.outer(self.first, self.first) / self.count
        values, vectors = torch.linalg.eigh(scatter)  # ascending
        directions = vectors[:, -k:].flip(1).T
        largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
        return directions * largest.sign(), values[-k:].flip(0).clamp(min=0) / values.clamp(min=0).sum()


class _Sums:
    """Moments of layers while they are called; layers called with the same tensor in a row share theirs."""

    def __init__(self, inputs_of: InputsOf) -> None:
        self.inputs_of = inputs_of
        self.moments: dict[str, Moments] = {}
        self.names: dict[str, str] = {}  # a layer to the one whose moments are its own
        self.batch: Any = None
        self.last: Tensor | None = None  # the input of the layer before
        self.owner = ""  # whose moments it is in

    def add(self, name: str, args: Args) -> None:
        same = self.last is args[0]
        owner = self.owner if same else name
        if self.names.setdefault(name, owner) != owner:
            raise ValueError(f"{name} has the input of another layer in one batch and one of its own in another")
        self.last, self.owner = args[0], owner
        if same:
            return
        with torch.autocast(args[0].device.type, enabled=False):
            inputs = self.inputs_of(name, self.batch, args[0]).float()
            self.moments.setdefault(name, Moments.about(inputs)).add(inputs)


def input_moments(
    layers: Mapping[str, Any], batches: Iterable[Any], forward: Callable[[Any], Any], inputs_of: InputsOf
) -> Iterator[tuple[list[str], Moments]]:
    """Moments of the inputs of all layers, some at a time: two gigabytes at most, or one layer's.

    Args:
        layers: name to adapted layer.
        batches: that are run, once for every part of the layers.
        forward: runs a batch.
        inputs_of: (layer's name, batch, its input) to the inputs that count, (n, in).

    Yields:
        the names of the layers that have an input in common (query, key and value), and its moments.
    """
    for part in _parts(layers):
        sums = _Sums(inputs_of)
        with torch.no_grad(), hooked({name: layers[name] for name in part}, before=sums.add):
            for batch in batches:
                sums.batch, sums.last = batch, None
                forward(batch)
        for first in list(sums.moments):
            yield [name for name, whose in sums.names.items() if whose == first], sums.moments.pop(first)


def _parts(layers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of layers whose moments fit into `HELD` bytes together; one at least."""
    part: list[str] = []
    held = 0
    for name, layer in layers.items():
        needed = 4 * layer.in_features**2
        if part and held + needed > HELD:
            yield part
            part, held = [], 0
        part.append(name)
        held += needed
    yield part
