"""Statistics of finished runs: of one, of several seeds, and of pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from abm_vision.runs import epochs as by_epoch

RESAMPLES = 10_000


def training_loss(result: dict[str, Any]) -> float:
    """Training loss, mean over all steps."""
    return float(np.mean(result["loss_per_step"]))


def delayed_training_loss(result: dict[str, Any], epochs: float) -> float:
    """The same when training begins so many epochs late: the first step's loss until then, and the end cut off."""
    losses = np.array(result["loss_per_step"])
    late = min(len(losses), epochs * by_epoch.steps_per_epoch(result))  # steps, a fraction at the end
    whole = len(losses) - int(np.ceil(late))
    rest = len(losses) - late - whole  # of the step that is only partly run
    total = late * losses[0] + losses[:whole].sum() + (rest * losses[whole] if rest else 0.0)
    return float(total / len(losses))


def seconds_before(result: dict[str, Any]) -> float:
    """What the initialisation took, its tuned reference included, in seconds."""
    return result["seconds"]["init"] + result["seconds"].get("reference", 0.0)


def cost(result: dict[str, Any]) -> float | None:
    """The same in median training epochs of the run; None where the cost of a given reference is not known."""
    if result["reference"] and result["reference"]["seconds"] is None:
        return None
    return seconds_before(result) / by_epoch.seconds(result)


def epoch_losses(runs: Sequence[dict[str, Any]]) -> np.ndarray:
    """Mean training loss of every epoch: (runs, epochs)."""
    return np.array([by_epoch.mean_losses(r) for r in runs])


def epochs_to(runs: Sequence[dict[str, Any]], target: float) -> float | None:
    """Epochs until the mean over runs of an epoch's loss is at the target, linear between epochs; None if never."""
    curve = epoch_losses(runs).mean(0)
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return None
    k = int(below[0])
    after = by_epoch.ends(runs[0])
    if k == 0:
        return float(after[0])
    return float(np.interp(-target, -curve[k - 1 : k + 1], after[k - 1 : k + 1]))


def deviation(values: Sequence[float] | np.ndarray) -> float | None:
    """Standard deviation; None for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None for a single value."""
    return float(stats.sem(values)) if len(values) > 1 else None


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of a mean: the percentiles of a seeded bootstrap; of a single value, that value twice."""
    if len(values) == 1:
        return float(values[0]), float(values[0])
    found = stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def signed_rank_p(differences: np.ndarray) -> float | None:
    """p of the two-sided Wilcoxon signed-rank test; None with fewer than two that are not zero."""
    return float(stats.wilcoxon(differences).pvalue) if np.count_nonzero(differences) > 1 else None
