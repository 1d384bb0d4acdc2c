"""The boundary loss and what is reported beside it: tensors in, tensors out.

Shapes: z (batch, ..., hidden) pre-activations, any float dtype; sign as z, boolean, true where the reference's
z > 0 (tau = +1) and false elsewhere (tau = -1); mask (batch, tokens), true where a token counts, or None.
Every figure is computed in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_loss(z: Tensor, sign: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """Mean of [max(0, m - tau z)]^2 over samples, tokens and hidden units of one layer.

    The inner term of Eq. (22), arXiv:2511.19145; layers are weighted and averaged by the caller.
    """
    # max(0, m - tau z) = m - min(m, tau z): as a mean squared error it is the fewest passes over z.
    capped = _counted(signed(z, sign), mask).clamp_max(margin)
    return F.mse_loss(capped, capped.new_tensor(margin).expand_as(capped))


def sign_agreement(z: Tensor, sign: Tensor, mask: Tensor | None = None) -> Tensor:
    """Match rate: the share of elements whose sign is the reference's, in [0, 1]."""
    return _counted((z > 0) == sign, mask).float().mean()


def inside_margin(z: Tensor, sign: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """The share of elements with tau z < m, those that the loss pushes, in [0, 1]."""
    return _counted(signed(z, sign) < margin, mask).float().mean()


def signed(z: Tensor, sign: Tensor) -> Tensor:
    """tau z in float32: positive on the reference's side of the boundary."""
    return z.float() * (2.0 * sign - 1.0)


def layer_weight(depth: int, layers: int, kind: str = "quadratic") -> float:
    """w_l^2 of Eq. (22) for layer `depth` = 0 .. layers-1 of one stack: ((l + 1) / L)^2, or 1 if "uniform"."""
    return ((depth + 1) / layers) ** 2 if kind == "quadratic" else 1.0


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else values[mask]


def pack_signs(sign: Tensor) -> Tensor:
    """Boolean tensor of any shape to bytes, eight signs in each: uint8, (ceil(numel / 8),)."""
    bits = sign.flatten()
    padding = -bits.numel() % 8
    bits = torch.nn.functional.pad(bits, (0, padding)).view(-1, 8).to(torch.uint8)
    return (bits << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: torch.Size) -> Tensor:
    """The boolean tensor of `shape` that `pack_signs` was given."""
    bits = (packed[:, None] >> _shifts(packed)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
