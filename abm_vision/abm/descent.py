"""AdamW for an initialisation: a few steps on factors of any precision, at a rate that falls linearly towards zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor


class Descent:
    """AdamW on an adapter's factors. A constant rate ends wherever its last batch, often a single one, has pushed.

    Args:
        factors: what is changed, any float dtype. Half precision has no room for AdamW's steps: they are made on
            float32 copies.
        learning_rate: at the first step.
        steps: their number.
    """

    def __init__(self, factors: Sequence[Tensor], learning_rate: float, steps: int) -> None:
        self._factors = factors
        self._masters = [f if torch.finfo(f.dtype).bits >= 32 else f.detach().float() for f in factors]
        self._optimiser = torch.optim.AdamW(self._masters, lr=learning_rate)
        self._schedule = torch.optim.lr_scheduler.LinearLR(self._optimiser, 1.0, 1.0 / steps, total_iters=steps - 1)
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
