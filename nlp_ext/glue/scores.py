"""GLUE's metrics, in [-1, 1] or [0, 1]. A prediction that is no label counts as wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from nlp_ext.glue.tasks import INVALID, GlueTask

Labels = Sequence[int | float]


def score(task: GlueTask, predictions: Sequence[int | float | None], labels: Labels) -> dict[str, float | int]:
    """Compute the task's metrics over all examples, and `invalid`, the number of predictions that are no label.

    An invalid class counts as a class that is never right: in F1 as the other one of two, in Matthews as a class of
    its own (as the other one it would be the perfect opposite). An invalid score counts as 0, the lowest.

    >>> from nlp_ext.glue.tasks import get_task
    >>> score(get_task("mrpc"), [1, 1, INVALID, 0], [1, 0, 0, 0])
    {'f1': 0.5, 'accuracy': 0.5, 'invalid': 1}

    Raises:
        ValueError: there are no examples, or not as many predictions as labels.
    """
    if not labels or len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels; as many are needed, at least one")
    invalid = sum(p is INVALID for p in predictions)
    found = {
        name: [_wrong(task, name, label) if p is INVALID else p for p, label in zip(predictions, labels, strict=True)]
        for name in task.scores
    }
    return {**{name: float(_METRICS[name](labels, filled)) for name, filled in found.items()}, "invalid": invalid}


def _wrong(task: GlueTask, metric: str, label: int | float) -> int | float:
    if metric == "matthews":
        return -1
    return (int(label) + 1) % len(task.labels) if task.labels else 0.0


def _correlation(measure: Callable[[Labels, Labels], tuple[float, float]]) -> Callable[[Labels, Labels], float]:
    """0 where all predictions (or labels) are equal, so that no correlation is defined."""

    def correlate(labels: Labels, predictions: Labels) -> float:
        if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
            return 0.0
        return measure(labels, predictions)[0]

    return correlate


_METRICS: Mapping[str, Callable[[Labels, Labels], float]] = {
    "accuracy": accuracy_score,
    "f1": f1_score,
    "matthews": matthews_corrcoef,
    "pearson": _correlation(pearsonr),
    "spearman": _correlation(spearmanr),
}
