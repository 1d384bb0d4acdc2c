"""Many runs over tasks, starts and seeds, after the protocol of VTAB-1K, that survive whatever happens to one of them.

Protocol (Zhai et al., arXiv:1910.04867): if settings are to be chosen, every combination of a stated grid, the same for
every task, is trained on the 800 images and scored on the other 200. The best is trained again on all 1,000 and scored
once on the test split, after its last epoch.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import vtab_tasks
from abm_vision.abm.files import CannotWrite
from abm_vision.runs import folder as files
from abm_vision.runs.content import Origin, check_finished
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Say
from abm_vision.runs.settings import check_used, uses
from abm_vision.vtab.config import EVALUATIONS, SCHEMA, SET_BY_SUITE, RunConfig, make_config
from abm_vision.vtab.harness import HARNESS, origin_parts, run

SELECTION_SEED = 0
WAIT = 5.0  # seconds until a run that another process is at is looked at again


@dataclass(frozen=True)
class Suite:
    """What is to be run.

    Args:
        tasks, inits: names.
        seeds: seeds 0, ..., seeds - 1 of every final run.
        settings: of all runs, as for `make_config`.
        grid: setting to the values that selection chooses from; empty: no selection.
        diagnose: measure the information loss of every final run's start.

    Raises:
        ValueError: a name is unknown or given twice, no seed, or a grid over what the suite itself sets.
    """

    tasks: tuple[str, ...]
    inits: tuple[str, ...]
    seeds: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    diagnose: bool = False

    def __post_init__(self) -> None:
        for name, values in (("tasks", self.tasks), ("init", self.inits), *self.grid.items()):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {', '.join(map(str, values)) or 'empty'}; give one or more, each once")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be 1 or more")
        taken = sorted(set(SET_BY_SUITE) & {*self.settings, *self.grid})
        if taken:
            raise ValueError(f"the suite itself sets {', '.join(taken)}: leave them out of settings and grid")
        both = sorted(set(self.grid) & set(self.settings))
        if both:
            raise ValueError(f"{', '.join(both)} is set and to be selected: give it once")
        check_used({*self.settings, *self.grid}, self.inits)
        self.final()  # checks the settings

    def selection(self) -> list[RunConfig]:
        """The runs that settings are chosen by; none without a grid."""
        if not self.grid:
            return []
        runs = (
            self._config(task, init, SELECTION_SEED, point, "val")
            for task, init in itertools.product(self.tasks, self.inits)
            for point in self._points()
        )
        return list(dict.fromkeys(runs))  # points that differ in what a start has no use for are one run

    def final(self, chosen: Mapping[tuple[str, str], Mapping[str, Any]] | None = None) -> list[RunConfig]:
        """The runs that are scored on the test split, with the settings chosen for each (task, start).

        Those for which nothing was chosen are left out. Before anything is, all are there with the grid's first point.
        """
        if chosen is None:
            chosen = dict.fromkeys(itertools.product(self.tasks, self.inits), next(self._points()))
        return [
            self._config(task, init, seed, chosen[task, init], "test")
            for task, init, seed in itertools.product(self.tasks, self.inits, range(self.seeds))
            if (task, init) in chosen
        ]

    def _points(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def _config(self, task: str, init: str, seed: int, point: Mapping[str, Any], evaluate: str) -> RunConfig:
        settings = {k: v for k, v in {**self.settings, **point}.items() if uses(init, k)}
        return make_config(**settings, task=task, init=init, seed=seed, evaluate=evaluate)


def parse_tasks(text: str) -> tuple[str, ...]:
    """`all`, groups and tasks with commas between, in the order of the table.

    Raises:
        ValueError: a name is neither a group nor a task.
    """
    wanted: set[str] = set()
    for word in text.split(","):
        if word in ("all", *vtab_tasks.GROUPS):
            wanted |= {task.name for task in vtab_tasks.TASKS.values() if word in ("all", task.group)}
        else:
            wanted.add(vtab_tasks.get_task(word).name)
    return tuple(name for name in vtab_tasks.TASKS if name in wanted)


# ---------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    `done` with its top-1, `failed` with the reason, `busy`: another process is at it, or `unwritable`: its files cannot
    be written, so that no other run's could be.
    """

    state: str
    top1: float | None = None
    reason: str = ""
    diverged: bool = False


Executor = Callable[[Sequence[RunConfig], Path, bool], Iterable[tuple[RunConfig, Outcome]]]


def attempt(config: RunConfig, out: Path, diagnose: bool, say: Say | None = None) -> Outcome:
    """One run, in this process. What can go wrong in one run and not in the next is its outcome."""
    try:
        result = run(config, out, diagnose=diagnose, say=say)
    except files.Busy:
        return Outcome("busy")
    except CannotWrite as error:
        return Outcome("unwritable", reason=str(error))
    except Exception as error:  # whatever it is, it is recorded and shown, and the other runs go on
        # One line: it stands in lists and tables.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason=reason, diverged=isinstance(error, Diverged))
    return Outcome("done", result["test"]["top1"])


def run_suite(suite: Suite, out: str | Path, execute: Executor, say: Say = print) -> dict[RunConfig, Outcome]:
    """Make all runs that `out` does not have yet. Several suites may work on the same folder at the same time.

    Args:
        suite: what is to be run.
        out: parent of the runs' folders.
        execute: makes runs and yields their outcomes as they come, see `executors.py`.
        say: receives a line about every run.

    Returns:
        The outcome of every run, those of selection first. Why a run failed is kept in its folder, `failure.json`; the
        same suite again tries it again.

    Raises:
        CannotWrite: `out` is full or read-only. What is there is whole, and the same suite goes on from it.
    """
    out = Path(out)
    outcomes = _run_all(suite.selection(), out, False, execute, say)
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for task, init in itertools.product(suite.tasks, suite.inits):
        tried = {c: o for c, o in outcomes.items() if (c.task, c.init) == (task, init)}
        scores = {c: o.top1 for c, o in tried.items() if o.state == "done"}
        lost = sum(o.state == "failed" and not o.diverged for o in tried.values())
        if lost:  # a choice from what is left would be another one after the next try
            say(f"{task} {init}: {lost} of {len(tried)} runs of the selection failed, so there is no final run yet")
            continue
        if tried and not scores:
            say(f"{task} {init}: every run of the selection has diverged, so there is no final run")
            continue
        # Ties go to the first of the grid.
        best = max(scores, key=lambda c: scores[c]) if scores else None
        chosen[task, init] = {name: getattr(best, name) for name in suite.grid if uses(init, name)} if best else {}
        if chosen[task, init]:
            say(f"{task} {init}: selected {_words(chosen[task, init])}, {100 * scores[best]:.1f} % of val200")
    final = suite.final(chosen)
    return {**outcomes, **_run_all(final, out, suite.diagnose, execute, say)}


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _run_all(
    configs: Sequence[RunConfig], out: Path, diagnose: bool, execute: Executor, say: Say
) -> dict[RunConfig, Outcome]:
    folders = {config: files.open_folder(out, config) for config in configs}
    outcomes: dict[RunConfig, Outcome] = {}

    def note(config: RunConfig, outcome: Outcome) -> None:
        if outcome.state == "busy":
            return
        if outcome.state == "unwritable":
            raise CannotWrite(outcome.reason)
        outcomes[config] = outcome
        if outcome.state == "failed":
            files.write_failure(folders[config], SCHEMA, outcome.reason)
        top1 = f"top-1 {100 * outcome.top1:.2f} %" if outcome.state == "done" else f"FAILED {outcome.reason}"
        say(f"[{len(outcomes)}/{len(configs)}] {_name(config)}: {top1}")

    known: dict[tuple[RunConfig, str], Origin] = {}  # the content of the runs' data, found once a task
    while left := [config for config in configs if config not in outcomes]:
        free = []
        for config in left:
            finished = _finished(config, folders[config], diagnose, known)
            if finished:
                note(config, finished)
            elif not files.is_locked(folders[config]):
                free.append(config)
        for config, outcome in execute(free, out, diagnose):
            note(config, outcome)
        if waiting := len(configs) - len(outcomes):
            say(f"{waiting} runs are with another process; looking again in {WAIT:.0f} s")
            time.sleep(WAIT)
    return outcomes


def _finished(
    config: RunConfig, folder: Path, diagnose: bool, known: dict[tuple[RunConfig, str], Origin]
) -> Outcome | None:
    """The outcome of a run that has nothing left to do; None otherwise, and for one whose result cannot be taken."""
    try:
        result = HARNESS.read(folder)
        if result is None or result["reference_only"] or (diagnose and not result["information_loss"]):
            return None
        files.check_same_run(result, config, folder)
        check_finished(result["origin"], origin_parts(config, known), folder)
    except ValueError:
        return None  # the run itself says what is wrong with it
    return Outcome("done", result["test"]["top1"])


def _name(config: RunConfig) -> str:
    kind = " (selection)" if config.evaluate == "val" else ""
    return f"{config.task} {config.init} lr {config.lr:g} seed {config.seed}{kind}"


# --------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Planned:
    """One run of a plan: how far it is, the seconds that it is likely to take yet, and why its result is no good."""

    config: RunConfig
    state: str
    seconds: float
    reason: str = ""


def plan(suite: Suite, out: str | Path, throughput: Mapping[str, float]) -> list[Planned]:
    """What the suite would run, selection first. Final runs stand there with the grid's first point.

    Args:
        throughput: images per second in `train` and `test`, and seconds of `start`, as `measure` gives them.
    """
    planned = []
    for config in (*suite.selection(), *suite.final()):
        folder = Path(out) / config.run_name()
        try:
            finished = HARNESS.read(folder) is not None
        except ValueError as error:
            planned.append(Planned(config, "not readable", 0.0, str(error)))
            continue
        if finished:
            planned.append(Planned(config, "finished", 0.0))
            continue
        state = "to run"
        if (folder / files.FAILURE).is_file():
            state = "failed before"
        elif HARNESS.interrupted(folder):
            state = "half done"
        task = vtab_tasks.get_task(config.task)
        train, test = map(task.size, EVALUATIONS[config.evaluate])
        if config.test_images:
            test = min(test, config.test_images)
        seconds = throughput["start"] + config.epochs * train / throughput["train"] + test / throughput["test"]
        planned.append(Planned(config, state, seconds))
    return planned


def measure(suite: Suite, out: str | Path) -> tuple[dict[str, float], str]:
    """The throughput to plan with, and in words where it is from.

    It is that of finished runs under `out` with the same model at the same size, or else of one epoch that is run now.
    """
    final = suite.final()[0]
    # Scored on the 200 images: the test split is not opened for this.
    short = replace(final, epochs=1, evaluate="val", warmup_epochs=min(1.0, final.warmup_epochs))
    if found := _throughput(out, short):
        return found, f"finished runs in {out}"
    with tempfile.TemporaryDirectory() as folder:
        run(short, folder)
        return _throughput(folder, short), f"one epoch of {short.task} just now"


def _throughput(out: str | Path, like: RunConfig) -> dict[str, float] | None:
    alike = ("model", "image_size", "batch_size", "targets", "precision", "device")
    finished = []
    for folder in Path(out).glob("*/"):
        with suppress(ValueError):  # a plan and a report name what cannot be read; here others will do
            finished.append(HARNESS.read(folder))
    found = [r for r in finished if r and all(r["config"][k] == getattr(like, k) for k in alike)]
    if not found:
        return None
    seconds = [r["seconds"] for r in found]
    return {
        "train": statistics.median(r["images_per_second"]["train"] for r in found),
        "test": statistics.median(r["images_per_second"]["test"] for r in found),
        "start": statistics.median(s["data"] + s["weights"] + s["lora"] + s["init"] for s in seconds),
    }
