"""AdamW for an initialisation: a few steps on factors of any precision, at a rate that falls linearly towards zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        self._scale: float | None = None  # of the loss, so that float16 does not round its gradient to zero

    def step(self, loss: Tensor, averaged: Iterable[Tensor]) -> None:
        """Go one step down.

        Args:
            loss: a scalar that depends on the factors.
            averaged: the tensors that it is a mean over.
        """
        if self._scale is None:
            sizes = [t.numel() for t in averaged]
            half = any(t.dtype == torch.float16 for t in averaged)
            self._scale = float(max(sizes)) if half else 1.0  # undoes the mean: dL/dz is of the order of m
        for master, gradient in zip(self._masters, self._gradients(loss), strict=True):
            master.grad = gradient  # None where the loss does not depend on it: AdamW leaves such a factor alone
        self._optimiser.step()
        with torch.no_grad():
            for factor, master in zip(self._factors, self._masters, strict=True):
                if master is not factor:
                    factor.copy_(master)
        self._schedule.step()

    def _gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Gradients in float32 at least; the scale is halved for as long as they overflow."""
        while True:
            scaled = torch.autograd.grad(
                loss * self._scale, self._factors, allow_unused=True, retain_graph=self._scale > 1
            )
            if self._scale <= 1 or all(g is None or g.isfinite().all() for g in scaled):
                wide = (g if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) for g in scaled)
                return [g if g is None else g / self._scale for g in wide]
            self._scale /= 2
