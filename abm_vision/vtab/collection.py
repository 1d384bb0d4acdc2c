"""The finished runs of a folder, and what can be said of them over tasks and seeds.

Real data and rendered surrogates are kept apart, and no average mixes them. An average over fewer tasks than its name
says knows their number.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

import vtab_tasks
from abm_vision.runs import folder as files
from abm_vision.runs.records import Failure, read_record
from abm_vision.runs.settings import uses
from abm_vision.vtab.comparison import BASELINE, area, data_content
from abm_vision.vtab.harness import HARNESS

_IDENTITY = ("task", "init", "seed")
# What was asked for and where it lay; what came of it is told by `_facts`.
_PLACES = ("data_dir", "workers", "source", "weights", "device", "precision", "abm_reference")
# Facts that may differ between runs of one method.
_CIRCUMSTANCES = ("device", "commit")
# Facts of a task and of an initialisation, which others do not share.
_OTHER, _CODE = "other data", "initialisation"


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


def _std(by_seed: np.ndarray) -> float | None:
    return float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None


@dataclass(frozen=True)
class Average:
    """A mean over tasks, or what there is of it.

    Args:
        name: `Natural`, `Specialized`, `Structured`, `m19` (over 19 tasks), `m3` (over the three groups' means), or
            `rendered`.
        value: in %, over the tasks that are there; None where there are none, or where a part would mislead.
        std: over seeds, of the mean of each seed.
        there, of: numbers of tasks.
        subset: whether of any of them fewer images than the test split has were counted.
    """

    name: str
    value: float | None
    std: float | None
    there: int
    of: int
    subset: bool = False

    def __str__(self) -> str:
        if self.value is None:
            return f"– ({self.there} of {self.of})"
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        mark = "†" if self.subset else ""
        return f"{self.value:.1f}{spread}{mark}" + ("" if self.there == self.of else f" ({self.there} of {self.of})")


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
        members = [[t.name for t in vtab_tasks.TASKS.values() if t.group == group] for group in vtab_tasks.GROUPS]
        groups = [
            self._average(group.capitalize(), tasks, method)
            for group, tasks in zip(vtab_tasks.GROUPS, members, strict=True)
        ]
        whole = self._average("m19", list(vtab_tasks.TASKS), method)
        if whole.there < whole.of:
            return [*groups, *(Average(name, None, None, whole.there, whole.of) for name in ("m19", "m3"))]
        by_seed = [self._by_seed(tasks, method) for tasks in members]
        std = None if whole.std is None else _std(np.mean(by_seed, axis=0))
        value = float(np.mean([group.value for group in groups]))
        return [*groups, whole, replace(whole, name="m3", value=value, std=std)]

    def missing(self, method: str) -> list[str]:
        """Tasks that the averages lack."""
        wanted = [t.name for t in vtab_tasks.TASKS.values() if self.kind == "real" or t.group == "structured"]
        return [task for task in wanted if (task, method) not in self.cells]

    def _average(self, name: str, tasks: Sequence[str], method: str) -> Average:
        cells = [self.cells[task, method] for task in tasks if (task, method) in self.cells]
        if not cells:
            return Average(name, None, None, 0, len(tasks))
        by_seed = self._by_seed(tasks, method)
        return Average(
            name,
            float(np.mean([cell.mean for cell in cells])),
            None if by_seed is None else _std(by_seed),
            len(cells),
            len(tasks),
            any(cell.subset for cell in cells),
        )

    def _by_seed(self, tasks: Sequence[str], method: str) -> np.ndarray | None:
        """The mean over tasks of each seed; None unless all tasks that are there have the same seeds."""
        cells = [self.cells[task, method] for task in tasks if (task, method) in self.cells]
        seeds = [[run["config"]["seed"] for run in cell.runs] for cell in cells]
        return np.mean([cell.values for cell in cells], axis=0) if all(s == seeds[0] for s in seeds) else None

    def paired(self) -> list[Paired]:
        """Every method against the baseline of the same settings, over the tasks and seeds that both have."""
        found = ((m, self._baseline(m)) for m in self.methods if self._start(m) != BASELINE)
        return [p for method, base in found if base is not None and (p := self._paired(method, base)) is not None]

    def unpaired(self) -> list[str]:
        """The methods that have no baseline of the same settings."""
        return [m for m in self.methods if self._start(m) != BASELINE and self._baseline(m) is None]

    def _start(self, method: str) -> str:
        return self._run(method)["config"]["init"]

    def _run(self, method: str) -> dict[str, Any]:
        return next(cell.runs[0] for (_, m), cell in self.cells.items() if m == method)

    def _baseline(self, method: str) -> str | None:
        """The one baseline there is; of several that whose settings, where they differ, are the method's."""
        baselines = [m for m in self.methods if self._start(m) == BASELINE]
        facts = _facts(self._run(method))
        baselines = [m for m in baselines if self._run(m)["own"].get(_OTHER) == facts[_OTHER]]
        if len(baselines) > 1:
            baselines = [m for m in baselines if self._run(m)["own"].items() <= facts.items()]
        return baselines[0] if len(baselines) == 1 else None

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

    A result that cannot be read is named among what has none, with the reason.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    folder = Path(folder)
    runs, unfinished, validated = [], [], 0
    for path in sorted(folder.glob(f"*/{files.CONFIG}")):
        try:
            result = HARNESS.read(path.parent)
        except ValueError as error:
            unfinished.append((path.parent.name, f"not readable: {error}"))
            continue
        if result is None:
            unfinished.append((path.parent.name, _why(path.parent)))
        elif result["config"]["evaluate"] == "test" and not result["reference_only"]:
            runs.append({**result, "file": f"{path.parent.name}/{files.RESULT}"})
        else:
            validated += result["config"]["evaluate"] == "val"
    if not runs:
        others = f" ({validated} scored on val200 are no results)" if validated else ""
        unread = "".join(f"; {name} is {why}" for name, why in unfinished if why.startswith("not readable"))
        raise FileNotFoundError(
            f"no finished run below {folder}{others}: give the folder that was --out of the runs{unread}"
        )
    runs, again = _once(_named(_with_data(runs)))
    unfinished += again
    order = list(vtab_tasks.TASKS)
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
    failure = folder / files.FAILURE
    if failure.is_file():
        try:
            return read_record(failure, Failure)["reason"]
        except ValueError as error:
            return f"failed; why is not readable: {error}"
    return "half done" if HARNESS.interrupted(folder) else "not begun"


def _with_data(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with `other_data`: None for those on the data that most runs of their task are on, else their hash.

    A test subset of another size is another one of the same data.
    """
    groups: dict[tuple[Any, ...], Counter[str]] = {}
    digests = [hashlib.sha256(repr(data_content(run)).encode()).hexdigest()[:8] for run in runs]
    keys = [(run["config"]["task"], source(run) == "rendered", run["test"]["count"]) for run in runs]
    for key, digest in zip(keys, digests, strict=True):
        groups.setdefault(key, Counter()).update([digest])
    most = {key: found.most_common(1)[0][0] for key, found in groups.items()}
    return [
        {**run, "other_data": None if digest == most[key] else digest}
        for run, key, digest in zip(runs, keys, digests, strict=True)
    ]


def _named(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs with `method`, their start and what differs between its runs of one task, and `own`, the latter alone.

    What differs between tasks only, as a selection makes it, stays within one method.
    """
    facts = [_facts(run) for run in runs]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run, fact in zip(runs, facts, strict=True):
        key = run["config"]["init"], run["config"]["task"], source(run) == "rendered"
        groups.setdefault(key, []).append(fact)
    differing: dict[str, set[str]] = {}
    for (init, *_), found in groups.items():
        names = {name for name in found[0] if any(fact[name] != found[0][name] for fact in found)}
        differing.setdefault(init, set()).update(names - {*_CIRCUMSTANCES, _OTHER})
    named = []
    for run, fact in zip(runs, facts, strict=True):
        init = run["config"]["init"]
        own = {name: fact[name] for name in sorted(differing[init])}
        if fact[_OTHER]:
            own[_OTHER] = fact[_OTHER]
        named.append({**run, "own": own, "method": ", ".join([init, *(f"{k} {v}" for k, v in own.items())])})
    return named


def _once(runs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The runs without those that are another one again, and what is to be said of these."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    again = []
    for run in runs:
        key = run["config"]["task"], run["method"], run["config"]["seed"], source(run) == "rendered"
        first = found.setdefault(key, run)
        if first is not run:
            same = all(run[part] == first[part] for part in ("loss_per_step", "test"))
            why = (
                "it is {} again"
                if same
                else "it has the settings of {} and another result on the same data: report each apart"
            )
            again.append((run["file"], f"left out, {why.format(first['file'])}"))
    return list(found.values()), again


def _facts(run: dict[str, Any]) -> dict[str, Any]:
    """Settings and circumstances that a reader must know to be equal; those that the start has a use for."""
    config, reference = run["config"], run["reference"]
    used = {k: v for k, v in config.items() if k not in (*_IDENTITY, *_PLACES) and uses(config["init"], k)}
    environment, sha256 = run["environment"], run["weights"]["sha256"]
    commit = environment["commit"]
    return {
        **used,
        "weights": f"sha256 {sha256[:12]}" if sha256 else "random",
        "data": source(run),
        _OTHER: run["other_data"],
        _CODE: run["origin"]["initialisation"],
        "precision": run["precision"],
        # A reference tuned by the run itself is another one for every seed.
        "reference": reference["folder"] if reference and config["abm_reference"] else "none given",
        "device": environment["device"],
        "commit": f"{commit['id'][:12]}{', modified' if commit['modified'] else ''}" if commit else "none",
    }


def _compare_settings(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    facts = [_facts(run) for run in runs]
    common, differing = {}, {}
    for name in dict.fromkeys(name for fact in facts for name in fact):
        values: dict[str, list[str]] = {}
        for fact, run in zip(facts, runs, strict=True):
            if name in fact and name not in (_OTHER, _CODE):  # a start without a use for a setting has no value of it
                values.setdefault(str(fact[name]), []).append(run["file"])
        if not values:
            continue
        if len(values) == 1:
            common[name] = next(fact[name] for fact in facts if name in fact)
        else:
            differing[name] = values
    return common, differing
