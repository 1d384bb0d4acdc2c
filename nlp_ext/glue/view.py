"""GLUE as commands and an analysis see it: each task's first metric, on its validation splits."""

from __future__ import annotations

import statistics
from typing import Any

from abm_vision.runs.view import Data, Mean, Score, Smoke, View
from nlp_ext import textview
from nlp_ext.glue.data import SYNTHETIC
from nlp_ext.glue.results import KEPT
from nlp_ext.glue.synthetic import SIZES
from nlp_ext.glue.tasks import TASKS, get_task

_ALL = tuple(TASKS)
_GROUPS = {  # as in GLUE's paper
    "sentences": ("cola", "sst2"),
    "similarity": ("mrpc", "stsb", "qqp"),
    "inference": ("mnli", "qnli", "rte", "wnli"),
}


def _metric(result: dict[str, Any]) -> str:
    return get_task(result["config"]["task"]).scores[0]


def value(result: dict[str, Any]) -> float:
    """The task's first metric, mean over its validation splits: MNLI has two."""
    return statistics.mean(scores[_metric(result)] for scores in result["scores"].values())


def _counted(result: dict[str, Any]) -> tuple[int, int]:
    """Examples that were scored, and those that there are; of files it is not recorded how many these are."""
    counts = {split: scores["count"] for split, scores in result["scores"].items()}
    whole = {"hub": get_task(result["config"]["task"]).sizes, SYNTHETIC: dict.fromkeys(counts, SIZES["validation"])}
    known = whole.get(result["data"]["train"]["source"], counts)
    return sum(counts.values()), sum(known[split] for split in counts)


def _details(result: dict[str, Any]) -> dict[str, Any]:
    invalid = sum(scores["invalid"] for scores in result["scores"].values())
    count, size = _counted(result)
    return {"metric": _metric(result), "invalid": invalid, "count": count, "split_size": size}


VIEW = View(
    program="abm-glue",
    name="GLUE",
    kept=KEPT,
    harness="nlp_ext.glue.harness:HARNESS",
    score=Score("score", "score", "validation", value, unit="%", scale=100.0, details=_details),
    data=Data(
        kinds=textview.kinds(
            "GLUE", "Stand-ins (not GLUE)", _ALL, (Mean("mean", f"mean of the {len(_ALL)} tasks", (_ALL,)),)
        ),
        kind=textview.kind,
        source=lambda result: result["data"]["validation"][0]["source"],
        content=textview.content,
        seeded=True,
        counted=_counted,
        samples="examples",
        subset="fewer examples than the validation split has, the first",
    ),
    smoke=Smoke({"epochs": 1, "batch_size": 8, "train_examples": 8, "validation_examples": 8}),
    groups={task: group for group, tasks in _GROUPS.items() for task in tasks},
    circumstances=textview.circumstances,
    asked=textview.ASKED,
)
