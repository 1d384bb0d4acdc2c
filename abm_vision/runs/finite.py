"""Weights that are no numbers are found where they are loaded."""

from __future__ import annotations

from torch import nn


def check_finite(model: nn.Module, what: str) -> None:
    """One pass over parameters and running statistics.

    Args:
        model: with its pretrained weights.
        what: where these are from, for the message.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first tensor and counts the others.
    """
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "running_" in n)]
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        others = f" and {len(broken) - 1} other tensors" if len(broken) > 1 else ""
        raise ValueError(f"{what}: {broken[0]}{others} hold NaN or infinite values: fetch the weights again")
