"""The finished runs of a folder, and what can be said of them over tasks and seeds.

Real data and rendered surrogates are kept apart, and no average mixes them. An average over fewer tasks than its name
says knows their number.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

import vtab_tasks
from abm_vision.vtab import results
from abm_vision.vtab.comparison import BASELINE, area

_IDENTITY = ("task", "init", "seed")
# Where a run was made and with how many processes says nothing about what was trained.
_PLACES = ("data_dir", "workers", "source", "weights", "device", "precision", "abm_reference")


@dataclass(frozen=True)
class Cell:
    """Top-1 of one method on one task, over seeds."""

    runs: tuple[dict[str, Any], ...]

    @property
    def values(self) -> np.ndarray:
        """In %, one a seed."""
        return np.array([100 * run["test"]["top1"] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, None for a single one."""
        return float(self.values.std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def subset(self) -> bool:
        """Whether fewer images than the test split has were counted."""
        return any(run["test"]["count"] < run["test"]["split_size"] for run in self.runs)

    @property
    def files(self) -> list[str]:
        """The result files, relative to the folder of the runs."""
        return [run["file"] for run in self.runs]

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.1f}{spread}{'†' if self.subset else ''}"


@dataclass(frozen=True)
class Average:
    """A mean over tasks, or what there is of it.

    Args:
        name: `Natural`, `Specialized`, `Structured`, `m19` (over 19 tasks), `m3` (over the three groups' means), or
            `rendered`.
        value: in %, over the tasks that are there; None where there are none, or where a part would mislead.
        std: over seeds, of the mean of each seed.
        there, of: numbers of tasks.
    """

    name: str
    value: float | None
    std: float | None
    there: int
    of: int

    def __str__(self) -> str:
        if self.value is None:
            return f"– ({self.there} of {self.of})"
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.value:.1f}{spread}" + ("" if self.there == self.of else f" ({self.there} of {self.of})")


@dataclass(frozen=True)
class Paired:
    """One method against the baseline, paired over tasks: differences of top-1 in points.

    `p` is of the two-sided Wilcoxon signed-rank test over tasks, None with fewer than two that differ.
    """

    method: str
    baseline: str
    tasks: int
    better: int
    worse: int
    difference: float
    area_ratio: float
    p: float | None


@dataclass(frozen=True)
class Section:
    """All that was run on one kind of data, `real` or `rendered`."""

    kind: str
    cells: dict[tuple[str, str], Cell]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in vtab_tasks.TASKS if any(task == name for task, _ in self.cells))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The baseline first."""
        found = dict.fromkeys(method for _, method in self.cells)
        return tuple(sorted(found, key=lambda m: (not m.startswith(BASELINE), m)))

    @property
    def title(self) -> str:
        if self.kind == "real":
            return "VTAB-1K, test top-1 in %"
        return "Rendered surrogates (not VTAB-1K), test top-1 in %"

    def averages(self, method: str) -> list[Average]:
        """Groups and both means for real data; one mean for rendered."""
        if self.kind == "rendered":
            drawable = [t.name for t in vtab_tasks.TASKS.values() if t.group == "structured"]
            return [self._average("rendered", drawable, method)]
        groups = [
            self._average(group.capitalize(), [t.name for t in vtab_tasks.TASKS.values() if t.group == group], method)
            for group in vtab_tasks.GROUPS
        ]
        whole = self._average("m19", list(vtab_tasks.TASKS), method)
        complete = whole.there == whole.of
        values = [g.value for g in groups]
        m3 = Average("m3", float(np.mean(values)) if complete else None, None, whole.there, whole.of)
        return [*groups, whole if complete else Average("m19", None, None, whole.there, whole.of), m3]

    def missing(self, method: str) -> list[str]:
        """Tasks that the averages lack."""
        wanted = [t.name for t in vtab_tasks.TASKS.values() if self.kind == "real" or t.group == "structured"]
        return [task for task in wanted if (task, method) not in self.cells]

    def _average(self, name: str, tasks: Sequence[str], method: str) -> Average:
        cells = [self.cells[task, method] for task in tasks if (task, method) in self.cells]
        if not cells:
            return Average(name, None, None, 0, len(tasks))
        seeds = [{run["config"]["seed"] for run in cell.runs} for cell in cells]
        std = None
        if all(s == seeds[0] for s in seeds) and len(seeds[0]) > 1:
            std = float(np.mean([cell.values for cell in cells], axis=0).std(ddof=1))
        return Average(name, float(np.mean([cell.mean for cell in cells])), std, len(cells), len(tasks))

    def paired(self) -> list[Paired]:
        """Every method against the baseline, over the tasks and seeds that both have."""
        if not self.methods:
            return []
        baseline = self.methods[0]
        return [p for method in self.methods[1:] if (p := self._paired(method, baseline)) is not None]

    def _paired(self, method: str, baseline: str) -> Paired | None:
        gains, ratios = [], []
        for task in self.tasks:
            ours, theirs = self.cells.get((task, method)), self.cells.get((task, baseline))
            if ours is None or theirs is None:
                continue
            by_seed = [{run["config"]["seed"]: run for run in cell.runs} for cell in (ours, theirs)]
            seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
            if seeds:
                pairs = [(by_seed[0][s], by_seed[1][s]) for s in seeds]
                gains.append(100 * np.mean([a["test"]["top1"] - b["test"]["top1"] for a, b in pairs]))
                ratios.append(np.mean([area(a) / area(b) for a, b in pairs]))
        if not gains:
            return None
        gain = np.array(gains)
        p = float(wilcoxon(gain).pvalue) if np.count_nonzero(gain) > 1 else None
        return Paired(
            method, baseline, len(gain), int((gain > 0).sum()), int((gain < 0).sum()), float(gain.mean()),
            float(np.mean(ratios)), p,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a folder of runs holds.

    Args:
        folder: which.
        sections: real data first; only those that there are.
        settings: what all runs have in common.
        differing: setting to {value: run files}, for what they have not.
        unfinished: (run folder, why it has no result).
        runs: every result by task, method and seed, with its `method`, and its `file` relative to the folder.
    """

    folder: Path
    sections: tuple[Section, ...]
    settings: dict[str, Any]
    differing: dict[str, dict[str, list[str]]]
    unfinished: tuple[tuple[str, str], ...]
    runs: tuple[dict[str, Any], ...]


def collect(folder: str | Path) -> Report:
    """Read the finished runs below a folder. Runs of a selection, scored on val200, are left out.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: a result is of another schema, or damaged.
    """
    folder = Path(folder)
    runs, unfinished = [], []
    for path in sorted(folder.glob(f"*/{results.CONFIG}")):
        result = results.read_result(path.parent)
        if result is None:
            unfinished.append((path.parent.name, _why(path.parent)))
        elif result["config"]["evaluate"] == "test":
            runs.append({**result, "file": f"{path.parent.name}/{results.RESULT}"})
    if not runs:
        raise FileNotFoundError(f"no finished run below {folder}: give the folder that was --out of the runs")
    names = _methods(runs)
    order = list(vtab_tasks.TASKS)
    runs = [{**run, "method": names[run["file"]]} for run in runs]
    runs.sort(key=lambda r: (order.index(r["config"]["task"]), r["method"], r["config"]["seed"]))
    sections = []
    for kind in ("real", "rendered"):
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in runs:
            if (source(run) == "rendered") == (kind == "rendered"):
                cells.setdefault((run["config"]["task"], run["method"]), []).append(run)
        if cells:
            sections.append(Section(kind, {key: Cell(tuple(found)) for key, found in cells.items()}))
    common, differing = _compare_settings(runs)
    return Report(folder, tuple(sections), common, differing, tuple(unfinished), tuple(runs))


def source(run: dict[str, Any]) -> str:
    """Where the run's test images are from."""
    return run["data"]["test"]["source"]


def _why(folder: Path) -> str:
    failure = folder / results.FAILURE
    if failure.is_file():
        return json.loads(failure.read_text(encoding="utf-8"))["reason"]
    return "half done" if (folder / results.CHECKPOINT).is_file() else "not begun"


def _methods(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Result file to the method's name: its start, and settings that make two runs of a task and seed different."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        key = (*(run["config"][k] for k in _IDENTITY), source(run) == "rendered")
        groups.setdefault(key, []).append(run["config"])
    differing = {
        name
        for configs in groups.values()
        for name in configs[0]
        if name not in _PLACES and any(config[name] != configs[0][name] for config in configs)
    }
    return {
        run["file"]: ", ".join(
            [run["config"]["init"], *(f"{name} {run['config'][name]}" for name in sorted(differing))]
        )
        for run in runs
    }


def _facts(run: dict[str, Any]) -> dict[str, Any]:
    """Settings and circumstances that a reader must know to be equal."""
    config = {k: v for k, v in run["config"].items() if k not in (*_IDENTITY, *_PLACES)}
    environment = run["environment"]
    return {
        **config,
        "weights (sha256)": run["weights"]["sha256"],
        "data": source(run),
        "precision": run["precision"],
        "device": environment["device"],
        "commit": environment["commit"],
    }


def _compare_settings(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    facts = [_facts(run) for run in runs]
    common, differing = {}, {}
    for name in facts[0]:
        values: dict[str, list[str]] = {}
        for fact, run in zip(facts, runs, strict=True):
            values.setdefault(str(fact[name]), []).append(run["file"])
        if len(values) == 1:
            common[name] = facts[0][name]
        else:
            differing[name] = values
    return common, differing
