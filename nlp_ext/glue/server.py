"""Predictions in the format of the GLUE server: a tab-separated file for every test split."""

from __future__ import annotations

from collections.abc import Sequence

from nlp_ext.glue.tasks import INVALID, GlueTask


def server_file(task: GlueTask, indices: Sequence[int], predictions: Sequence[int | float | None]) -> str:
    """Write `index` and `prediction` in the order of the indices; a prediction that is no label becomes label 0.

    The server accepts no file with gaps.

    Raises:
        ValueError: not as many predictions as indices.
    """
    rows = sorted(zip(indices, predictions, strict=True), key=lambda row: row[0])
    lines = [f"{index}\t{_written(task, prediction)}" for index, prediction in rows]
    return "\n".join(["index\tprediction", *lines]) + "\n"


def _written(task: GlueTask, prediction: int | float | None) -> str:
    if not task.labels:
        return f"{0.0 if prediction is INVALID else prediction:.3f}"
    label = 0 if prediction is INVALID else int(prediction)
    return task.labels[label] if task.answers == "text" else str(label)
