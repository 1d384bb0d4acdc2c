"""VTAB-1K as an analysis sees it: top-1 on the test split, by task and group."""

from __future__ import annotations

from typing import Any

import vtab_tasks
from abm_vision.analysis.published import PUBLISHED
from abm_vision.analysis.view import Kind, Mean, View
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


def _sources(result: dict[str, Any]) -> dict[str, str]:
    return {"training data": result["data"]["train"]["source"], "test data": result["data"]["test"]["source"]}


VIEW = View(
    program="abm-vtab",
    name="VTAB-1K",
    kept=KEPT,
    harness="abm_vision.vtab.harness:HARNESS",
    estimate="abm_vision.vtab.planning:estimate",
    key="top1",
    score="top-1",
    split="test",
    unit="%",
    value=lambda result: result["test"]["top1"],
    scale=100.0,
    limits=(0, 100),
    details=lambda result: {key: result["test"][key] for key in ("top1", "correct", "count", "split_size")},
    counted=lambda result: (result["test"]["count"], result["test"]["split_size"]),
    samples="images",
    subset="fewer images than the test split has, drawn with a fixed seed",
    selection={"evaluate": "val"},
    selection_split="val200",
    kinds=(_REAL, _RENDERED),
    kind=lambda result: "rendered" if result["data"]["test"]["source"] == "rendered" else "real",
    sources=_sources,
    content=lambda result: {part: result["origin"][part] for part in _CONTENT if "origin" in result},
    asked=("source", "data_dir", "workers"),
    groups={task.name: task.group for task in vtab_tasks.TASKS.values()},
    model=lambda settings: f"{settings['model']}, {settings['image_size']} px",
)
