"""A training by epochs, of a result. The last may be a part of one, where the number of steps was bounded."""

from __future__ import annotations

from typing import Any

import numpy as np


def steps_per_epoch(result: dict[str, Any]) -> int:
    """Training steps of a whole epoch."""
    return result.get("steps_per_epoch") or len(result["loss_per_step"]) // result["config"]["epochs"]


def ends(result: dict[str, Any]) -> np.ndarray:
    """Where the epochs end, in epochs: 1, 2, ..., and where the last does: (epochs,)."""
    whole = len(result["loss_per_step"]) / steps_per_epoch(result)
    return np.minimum(np.arange(1, np.ceil(whole) + 1), whole)


def middles(result: dict[str, Any]) -> np.ndarray:
    """The middle of every epoch, in epochs: (epochs,)."""
    found = ends(result)
    return (found + np.arange(len(found))) / 2


def mean_losses(result: dict[str, Any]) -> np.ndarray:
    """Mean training loss of every epoch: (epochs,)."""
    losses, steps = np.array(result["loss_per_step"]), steps_per_epoch(result)
    return np.array([losses[k : k + steps].mean() for k in range(0, len(losses), steps)])


def seconds(result: dict[str, Any]) -> float:
    """Median seconds of an epoch; those of a part count for a whole one."""
    return float(np.median(np.array(result["seconds_per_epoch"]) / np.diff(ends(result), prepend=0)))
