"""AdamW for an initialisation: a few steps on factors of any precision, at a rate that rises and falls linearly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor


def share_of_rate(step: int, steps: int) -> float:
    """The share of the highest rate at step 0 .. steps - 1.

    >>> [share_of_rate(step, 4) for step in range(4)]
    [0.5, 1.0, 0.6666666666666666, 0.3333333333333333]
    """
    rising = (steps + 1) // 2
    return min((step + 1) / rising, (steps - step) / (steps - rising + 1))


class Descent:
    """AdamW on an adapter's factors.

    Its first steps are of one length, whatever the gradient's: at the full rate they throw B = 0 far beyond what they
    look for (the boundary loss doubles), so the rate rises over the first half of the steps. It falls over the second:
    a constant rate ends wherever its last batch, often a single one, has pushed.

    Args:
        factors: what is changed, any float dtype. Half precision has no room for AdamW's steps: they are made on
            float32 copies.
        learning_rate: the highest, in the middle.
        steps: their number.
    """

    def __init__(self, factors: Sequence[Tensor], learning_rate: float, steps: int) -> None:
        self._factors = factors
        self._masters = [f if torch.finfo(f.dtype).bits >= 32 else f.detach().float() for f in factors]
        fused = all(f.device.type in ("cpu", "cuda") for f in factors)
        self._optimiser = torch.optim.AdamW(self._masters, lr=learning_rate, fused=fused)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, partial(share_of_rate, steps=steps))
        self._scale: float | None = None

    def scale_of(self, averaged: Iterable[Tensor]) -> float:
        """Return what the loss is to be multiplied by, so that float16 does not round its gradient to zero.

        Args:
            averaged: the tensors that it is a mean over.
        """
        if self._scale is None:
            sizes = [t.numel() for t in averaged if t.dtype == torch.float16]
            self._scale = float(max(sizes, default=1))  # undoes the mean: dL/dz is of the order of m
        return self._scale

    def step(self, backward: Callable[[float | None], Tensor]) -> Tensor:
        """Go one step down; where gradients overflow, the scale is halved first, for as long as they do.

        Args:
            backward: (scale, None in the first step: `scale_of`) leaves the factors' gradients in `.grad` and returns
                the loss, or losses, both scaled.

        Returns:
            What `backward` returned, without the scale.
        """
        losses = backward(self._scale)
        while self._scale > 1 and not all(g is None or g.isfinite().all() for g in (f.grad for f in self._factors)):
            self._scale /= 2
            self.clear()
            losses = backward(self._scale)
        for factor, master in zip(self._factors, self._masters, strict=True):
            if factor.grad is not None:  # where the loss does not depend on it AdamW leaves a factor alone
                wide = factor.grad.to(torch.promote_types(factor.dtype, torch.float32))
                master.grad = wide / self._scale if self._scale > 1 else wide
        self._optimiser.step()
        with torch.no_grad():
            for factor, master in zip(self._factors, self._masters, strict=True):
                if master is not factor:
                    factor.copy_(master)
        self._schedule.step()
        losses = losses / self._scale if self._scale > 1 else losses
        self.clear()
        return losses

    def clear(self) -> None:
        """Forget all gradients."""
        for tensor in (*self._factors, *self._masters):
            tensor.grad = None
