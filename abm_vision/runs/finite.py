"""Find weights that are not finite when they are loaded."""

from __future__ import annotations

from torch import nn

from abm_vision.abm.arguments import count


def check_finite(model: nn.Module, what: str) -> None:
    """Check parameters and running statistics in one pass.

    Args:
        model: the model with its pretrained weights.
        what: origin of the weights, for the message.

    Raises:
        ValueError: a value is NaN or infinite; the message names the first tensor and counts the others.
    """
    tensors = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "running_" in n)]
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        others = f" and {count(len(broken) - 1, 'other tensor')}" if len(broken) > 1 else ""
        raise ValueError(f"{what}: {broken[0]}{others} hold NaN or infinite values: fetch the weights again")
