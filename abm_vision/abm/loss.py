"""The boundary loss and what is reported beside it: tensors in, tensors out.

Shapes: z (batch, ..., hidden) pre-activations, any float dtype; sign as z, boolean, true where the reference's
z > 0 (tau = +1) and false elsewhere (tau = -1); mask (batch, tokens), true where a token counts, or None (see
`whole_mask`).
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
    return _hinge(counted(signed(z, sign), mask), margin)


def boundary_figures(z: Tensor, sign: Tensor, margin: float, mask: Tensor | None = None) -> Tensor:
    """What is reported of one layer, (3,): the boundary loss, the match rate, and the share inside the margin.

    The match rate is the share of elements whose sign is the reference's; inside the margin are those with
    tau z < m, which the loss pushes. Both lie in [0, 1].
    """
    distance = counted(signed(z, sign), mask)
    shares = [_share(counted((z > 0) == sign, mask)), _share(distance < margin)]
    return torch.stack([_hinge(distance, margin), *shares])


def signed(z: Tensor, sign: Tensor) -> Tensor:
    """tau z in float32: positive on the reference's side of the boundary.

    Raises:
        ValueError: both have other shapes.
    """
    if z.shape != sign.shape:
        raise ValueError(
            f"the model's pre-activation is {tuple(z.shape)}, the reference's {tuple(sign.shape)}: they must be models "
            "of the same width, on the same batch"
        )
    return z.float() * (2.0 * sign - 1.0)


def layer_weight(depth: int, layers: int, kind: str = "quadratic") -> float:
    """w_l^2 of Eq. (22) for layer `depth` = 0 .. layers-1 of one stack: ((l + 1) / L)^2, or 1 if "uniform"."""
    return ((depth + 1) / layers) ** 2 if kind == "quadratic" else 1.0


def _hinge(distance: Tensor, margin: float) -> Tensor:
    # max(0, m - d) = m - min(m, d): as a mean squared error it is the fewest passes over the elements.
    capped = distance.clamp_max(margin)
    return F.mse_loss(capped, capped.new_tensor(margin).expand_as(capped))


def _share(chosen: Tensor) -> Tensor:
    return chosen.count_nonzero() / chosen.numel()


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values (batch, tokens, ...) of the tokens that count: (counted, ...); all of them without a mask."""
    return values if mask is None else values[whole_mask(mask, values)]


def whole_mask(mask: Tensor, values: Tensor) -> Tensor:
    """A mask for all tokens of `values` (batch, tokens, ...), on their device.

    A mask of fewer tokens is of the last ones: class and register tokens stand before the patches, and count.

    Raises:
        ValueError: it is of other samples, or of more tokens.
    """
    before = values.shape[1] - mask.shape[1] if mask.ndim == 2 and values.ndim > 2 else -1
    if before < 0 or len(mask) != len(values):
        raise ValueError(
            f"a token mask {tuple(mask.shape)} does not fit values {tuple(values.shape)}: it must be (batch, tokens)"
        )
    if not mask.any():
        raise ValueError("the token mask leaves no token of a batch: leave the batch out")
    return F.pad(mask.to(values.device).bool(), (before, 0), value=True)


def pack_signs(sign: Tensor) -> Tensor:
    """Boolean (n, ...) to bytes, eight signs in each: uint8 (n, bytes), so that samples can be cut apart."""
    bits = sign.flatten(1) if sign.ndim > 1 else sign[:, None]
    bits = F.pad(bits, (0, -bits.shape[1] % 8)).unflatten(1, (-1, 8)).to(torch.uint8)
    return (bits << _shifts(bits)).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, shape: torch.Size) -> Tensor:
    """The boolean tensor of `shape` that `pack_signs` was given."""
    bits = (packed[..., None] >> _shifts(packed)) & 1
    return bits.flatten(1)[:, : shape[1:].numel()].reshape(shape).bool()


def _shifts(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)
