"""VTAB-1K as an analysis sees it: top-1 on the test split, by task and group."""

from __future__ import annotations

from typing import Any

import vtab_tasks
from abm_vision.analysis.published import PUBLISHED
from abm_vision.runs.view import Data, Kind, Mean, Score, Selection, Smoke, View
from abm_vision.vtab.config import HANDFUL
from abm_vision.vtab.results import KEPT

_ALL = tuple(vtab_tasks.TASKS)
_GROUPS = {
    group: tuple(task.name for task in vtab_tasks.TASKS.values() if task.group == group) for group in vtab_tasks.GROUPS
}
_CONTENT = ("training images", "training labels", "test images", "test labels")

_REAL = Kind(
    "real",
    "VTAB-1K",
    tasks=_ALL,
    means=(
        *(Mean(group.capitalize(), f"{group.capitalize()}, mean", (tasks,)) for group, tasks in _GROUPS.items()),
        Mean("m19", "m19, mean of the 19 tasks", (_ALL,), whole=True),
        Mean("m3", "m3, mean of the 3 groups", tuple(_GROUPS.values()), whole=True),
    ),
    published=PUBLISHED,
)
_RENDERED = Kind(
    "rendered",
    "Rendered surrogates (not VTAB-1K)",
    tasks=_GROUPS["structured"],
    means=(Mean("rendered", "mean of the rendered tasks", (_GROUPS["structured"],)),),
    note="Rendered data are drawn by this package. They are not VTAB-1K and compare with no published row.",
)


def _content(result: dict[str, Any]) -> dict[str, str]:
    """Empty for records of benchmarks, which have no origin."""
    return {part: result["origin"][part] for part in _CONTENT if "origin" in result}


VIEW = View(
    program="abm-vtab",
    name="VTAB-1K",
    kept=KEPT,
    harness="abm_vision.vtab.harness:HARNESS",
    estimate="abm_vision.vtab.planning:estimate",
    score=Score(
        key="top1",
        name="top-1",
        split="test",
        value=lambda result: result["test"]["top1"],
        unit="%",
        scale=100.0,
        followed=lambda result: result["top1_per_epoch"],
        details=lambda result: {key: result["test"][key] for key in ("correct", "count", "split_size")},
    ),
    data=Data(
        kinds=(_REAL, _RENDERED),
        kind=lambda result: "rendered" if result["data"]["test"]["source"] == "rendered" else "real",
        source=lambda result: result["data"]["test"]["source"],
        content=_content,
        counted=lambda result: (result["test"]["count"], result["test"]["split_size"]),
        samples="images",
        subset="fewer images than the test split has, drawn with a fixed seed",
    ),
    selection=Selection({"evaluate": "val"}, split="val200"),
    smoke=Smoke(
        {"epochs": 1, "batch_size": HANDFUL, "test_images": HANDFUL},
        harness="abm_vision.vtab.harness:SMOKE",
    ),
    groups={task.name: task.group for task in vtab_tasks.TASKS.values()},
    model=lambda settings: f"{settings['model']}, {settings['image_size']} px",
    asked=("source", "data_dir", "workers"),
)
