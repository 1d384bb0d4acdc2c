"""Activation boundaries: Eq. (22) of arXiv:2511.19145, and what is measured beside it. Tensors in, tensors out.

A boundary is the input of an activation module; its unit h is active where its pre-activation z_h > 0. Axes:

    z      (batch, ..., hidden)  pre-activations of the adapted model, any float dtype
    sign   (batch, ..., hidden)  boolean: the reference's z > 0, that is tau = +1; elsewhere tau = -1
    mask   (batch, tokens)       true where a token counts, or None for all

All of them are mappings by the boundary's name (masks: by its stack). Every figure is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import register_pytree_node

from abm_vision.abm.batches import counted
from abm_vision.abm.settings import ABMConfig


@dataclass(frozen=True)
class Boundary:
    """A matched boundary: its activation module, its stack, w_l^2, and the margin m in units of z."""

    name: str
    stack: str
    weight: float
    margin: float


def boundary_loss(
    boundaries: Sequence[Boundary],
    z: Mapping[str, Tensor],
    sign: Mapping[str, Tensor],
    mask: Mapping[str, Tensor | None],
) -> Tensor:
    """Compute Eq. (22), arXiv:2511.19145: L = 1/L sum_l w_l^2 mean [max(0, m - tau z)]^2, a float32 scalar.

    The mean inside a layer is over samples, tokens that count, and hidden units.

    Raises:
        ValueError: z and sign of a boundary have other shapes.
    """
    return boundary_losses(boundaries, z, sign, mask).mean()


def boundary_losses(
    boundaries: Sequence[Boundary],
    z: Mapping[str, Tensor],
    sign: Mapping[str, Tensor],
    mask: Mapping[str, Tensor | None],
) -> Tensor:
    """Compute what Eq. (22) is the mean of: w_l^2 mean [max(0, m - tau z)]^2 of every layer, float32 (layers,)."""
    losses = []
    for b in boundaries:
        distance = signed(z[b.name], sign[b.name], mask[b.stack])
        losses.append(b.weight * _MeanSquaredHinge.apply(distance, b.margin))  # w_l^2, mean inside the layer
    return torch.stack([loss.to(losses[0].device) for loss in losses])  # perhaps on several devices


class _MeanSquaredHinge(torch.autograd.Function):
    """mean [max(0, m - d)]^2 of distances d. Units are many: autograd's own ops pass over them twice as often."""

    @staticmethod
    def forward(ctx: Any, distance: Tensor, margin: float) -> Tensor:
        short = (margin - distance).clamp_min_(0)
        ctx.save_for_backward(short)
        return short.square().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (short,) = ctx.saved_tensors
        return short * (grad * (-2.0 / short.numel())), None


def boundary_figures(
    boundaries: Sequence[Boundary],
    z: Mapping[str, Tensor],
    sign: Mapping[str, Tensor],
    mask: Mapping[str, Tensor | None],
) -> Tensor:
    """Measure every boundary: (layers, 3) with its loss (w_l^2 left out), match rate and share inside the margin.

    The match rate is the share of elements on the reference's side of the boundary; inside the margin are those with
    tau z < m, which the loss pushes. Both lie in [0, 1].
    """
    figures = []
    for b in boundaries:
        side = sign[b.name]  # unpacked once
        distance = signed(z[b.name], side, mask[b.stack])
        same_side = counted((z[b.name] > 0) == side, mask[b.stack])
        loss = _MeanSquaredHinge.apply(distance, b.margin)
        figures.append(torch.stack([loss, _share(same_side), _share(distance < b.margin)]))
    return torch.stack([figure.to(figures[0].device) for figure in figures])


def signed(z: Tensor, sign: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute tau z in float32: (tokens that count, ..., hidden), positive on the reference's side of the boundary.

    Raises:
        ValueError: both have other shapes.
    """
    if z.shape != sign.shape:
        raise ValueError(
            f"the model's pre-activation is {tuple(z.shape)}, the reference's {tuple(sign.shape)}: they must be models "
            "of the same width, on the same batch"
        )
    tau = counted(sign, mask).to(z.dtype).mul_(2).sub_(1)
    return (counted(z, mask) * tau).float()  # exact in every precision


def _share(chosen: Tensor) -> Tensor:
    return chosen.count_nonzero() / chosen.numel()


# --------------------------------------------------------------------------------------- which boundaries, and w_l^2


def choose_boundaries(stacks: Mapping[str, Sequence[str]], config: ABMConfig) -> dict[str, tuple[str, float]]:
    """Choose the boundaries to match.

    Args:
        stacks: stack to the names of its activation modules, in the order of their depth.
        config: its `layers` and `layer_weights`.

    Returns:
        Module name to (stack, w_l^2).

    Raises:
        ValueError: `config.layers` asks for more layers than a stack has, or for a name that is no boundary.
    """
    stacks = {stack: names for stack, names in stacks.items() if names}
    if isinstance(config.layers, int):
        for stack, names in stacks.items():
            if len(names) < config.layers:
                raise ValueError(f"layers is {config.layers}, but stack {stack!r} has only {len(names)} boundaries")
        stacks = {stack: names[-config.layers :] for stack, names in stacks.items()}
    elif not isinstance(config.layers, str):
        known = [n for names in stacks.values() for n in names]
        unknown = [n for n in config.layers if n not in known]
        if unknown or not config.layers:
            given = ", ".join(unknown) or "an empty list"
            raise ValueError(f"layers names {given}; the boundaries of this model are {', '.join(known)}")
        stacks = {stack: [n for n in names if n in config.layers] for stack, names in stacks.items()}
    return {
        name: (stack, layer_weight(depth, len(names), config.layer_weights))
        for stack, names in stacks.items()
        for depth, name in enumerate(names)
    }


def layer_weight(depth: int, layers: int, kind: str = "quadratic") -> float:
    """Compute w_l^2 of Eq. (22) for layer `depth` = 0 .. layers - 1 of one stack: ((l + 1) / L)^2, or 1 if "uniform".

    >>> [layer_weight(depth, 4) for depth in range(4)]
    [0.0625, 0.25, 0.5625, 1.0]
    """
    return ((depth + 1) / layers) ** 2 if kind == "quadratic" else 1.0


# ------------------------------------------------------------------------------------------------- signs, as bits


class Signs(Mapping[str, Tensor]):
    """The reference's signs on one batch, kept as bits: `signs[name]` is boolean, (batch, ..., hidden).

    Args:
        packed: boundary to its bits (batch, bytes) and their shape as booleans.
    """

    def __init__(self, packed: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
        self._packed = dict(packed)

    @classmethod
    def of(cls, z: Mapping[str, Tensor]) -> Signs:
        """Keep the signs of pre-activations, and nothing else of them."""
        return cls({name: (pack_signs(value > 0), tuple(value.shape)) for name, value in z.items()})

    def __getitem__(self, name: str) -> Tensor:
        return unpack_signs(*self._packed[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)

    def are_of(self, samples: int) -> bool:
        """Whether every boundary has one entry a sample; TNT folds its patches into the batch dimension."""
        return all(shape[0] == samples for _, shape in self._packed.values())

    def cut(self, start: int, stop: int) -> Signs:
        """The signs of samples start .. stop - 1."""
        cut = {n: (bits[start:stop], (stop - start, *s[1:])) for n, (bits, s) in self._packed.items()}
        return Signs(cut)


register_pytree_node(Signs, lambda signs: ([signs._packed], None), lambda children, _: Signs(*children))


def pack_signs(sign: Tensor) -> Tensor:
    """Pack booleans (n, ...) into bytes, eight signs in each: uint8 (n, bytes), so that samples can be cut apart."""
    bits = sign.flatten(1) if sign.ndim > 1 else sign[:, None]
    eight = F.pad(bits, (0, -bits.shape[1] % 8)).contiguous().view(torch.int64)  # one byte each
    return ((eight * _GATHER) >> 56).to(torch.uint8)  # the product's highest byte has the eight bits


def unpack_signs(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Give back the booleans of `shape` that `pack_signs` was given."""
    bits = _bits_of_bytes(packed.device).index_select(0, packed.flatten().int())
    return bits.view(len(packed), -1)[:, : math.prod(shape[1:])].reshape(shape)


_GATHER = 0x0102040810204080  # moves bit 8 i to bit 56 + i


@cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """What every byte is packed from: boolean (256, 8)."""
    return torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1 == 1
