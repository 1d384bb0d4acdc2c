"""The order of training samples: a function of the seed alone, so that a run can be resumed."""

from __future__ import annotations

import torch
from torch import Tensor

DIAGNOSIS_SAMPLES, DIAGNOSIS_BATCH = 64, 8  # a batch's activations and one gradient per layer must fit into memory


def shuffled(count: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """Return the batches of one epoch as index tensors."""
    generator = torch.Generator("cpu").manual_seed(seed * 100_003 + epoch)
    return list(torch.randperm(count, generator=generator, device="cpu").split(batch_size))


def diagnosis_batches(count: int, calibration: int, seed: int, seen: bool) -> list[Tensor]:
    """Return the batches for information loss: the calibration samples if `seen`, else others.

    The others are from the other end of the shuffled set; the initialisation does not see them (though a tuned
    reference has).

    Raises:
        ValueError: the calibration leaves too few samples.
    """
    free = count - calibration
    if free < DIAGNOSIS_SAMPLES:
        raise ValueError(
            f"information loss needs {DIAGNOSIS_SAMPLES} training samples besides those of the calibration, "
            f"abm_samples {calibration} of {count}: "
            + (f"lower it to {count - DIAGNOSIS_SAMPLES}, or " if count > DIAGNOSIS_SAMPLES else "")
            + f"take {calibration + DIAGNOSIS_SAMPLES} samples or more"
        )
    (order,) = shuffled(count, count, seed, 0)
    chosen = order[:calibration] if seen else order[-DIAGNOSIS_SAMPLES:]
    return list(chosen.split(DIAGNOSIS_BATCH))
