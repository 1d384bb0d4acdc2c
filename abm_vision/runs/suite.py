"""Many runs over tasks, initialisations and seeds that survive whatever happens to one of them.

Protocol (that of VTAB-1K, Zhai et al., arXiv:1910.04867): if settings are to be chosen, every combination of a stated
grid, the same for every task, is trained and scored on a part of the training data. The best is trained again on all of
them and scored once, after its last epoch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from abm_vision.abm.files import CannotWrite
from abm_vision.runs import folder as files
from abm_vision.runs.content import Origin, check_finished
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Harness, Session
from abm_vision.runs.run import run
from abm_vision.runs.settings import AdapterSettings
from abm_vision.runs.view import View

SELECTION_SEED = 0
WAIT = 5.0  # seconds until a run that another process is at is looked at again


@dataclass(frozen=True)
class Suite:
    """What is to be run.

    Args:
        view: of which harness.
        tasks, inits: names.
        seeds: seeds 0, ..., seeds - 1 of every final run.
        settings: of all runs, as for the harness's configuration.
        grid: setting to the values that selection chooses from; empty: no selection.
        rates: learning rates that every final run is made with; empty: that of the settings.

    Raises:
        ValueError: a name is unknown or given twice, no seed, a grid where nothing can be selected on, or one over what
            the suite itself sets.
    """

    view: View
    tasks: tuple[str, ...]
    inits: tuple[str, ...]
    seeds: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rates = [("lr", self.rates)] if self.rates else []
        for name, values in (("task", self.tasks), ("init", self.inits), *rates, *self.grid.items()):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {', '.join(map(str, values)) or 'empty'}; give one or more, each once")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be 1 or more")
        if self.grid and not self.view.selection.settings:
            raise ValueError(
                f"{self.view.name} has no samples to choose settings on but those that are scored at the end: leave "
                "--grid out"
            )
        taken = sorted(set(self.view.set_by_suite) & {*self.settings, *self.grid})
        if taken:
            raise ValueError(f"the suite itself sets {', '.join(taken)}: leave them out of settings and grid")
        both = sorted(set(self.grid) & set(self.settings))
        if both:
            raise ValueError(f"{', '.join(both)} is set and to be selected: give it once")
        self.view.config.check_used({*self.settings, *self.grid}, self.inits)
        self.final()  # checks the settings

    def selection(self) -> list[AdapterSettings]:
        """The runs that settings are chosen by; none without a grid."""
        if not self.grid:
            return []
        runs = (
            self._config(task, init, SELECTION_SEED, {**point, **self.view.selection.settings})
            for task, init in itertools.product(self.tasks, self.inits)
            for point in self._points()
        )
        return list(dict.fromkeys(runs))  # points that differ in what an initialisation has no use for are one run

    def final(self, chosen: Mapping[tuple[str, str], Mapping[str, Any]] | None = None) -> list[AdapterSettings]:
        """The runs that are results, with the settings chosen for each (task, initialisation).

        Those for which nothing was chosen are left out. Before anything is, all are there with the grid's first point.
        """
        if chosen is None:
            chosen = dict.fromkeys(itertools.product(self.tasks, self.inits), next(self._points()))
        rates = [{"lr": rate} for rate in self.rates] or [{}]
        return [
            self._config(task, init, seed, {**chosen[task, init], **rate})
            for task, init, rate, seed in itertools.product(self.tasks, self.inits, rates, range(self.seeds))
            if (task, init) in chosen
        ]

    @cached_property
    def harness(self) -> Harness:
        """The harness, loaded."""
        return resolve_name(self.view.harness)

    def estimate(self, out: str | Path) -> tuple[Callable[[AdapterSettings], float] | None, str]:
        """A function to the seconds that a run is likely to take, None if nothing is known; and in words why."""
        if not self.view.estimate:
            return None, "how long they take is not known before"
        return resolve_name(self.view.estimate)(self.final()[0], out)

    def _points(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def _config(self, task: str, init: str, seed: int, point: Mapping[str, Any]) -> AdapterSettings:
        config = self.view.config
        settings = {k: v for k, v in {**self.settings, **point}.items() if config.uses(init, k)}
        return config.make(**settings, **_of_task(config, task), init=init, seed=seed)


def _of_task(config: type[AdapterSettings], task: str) -> dict[str, str]:
    """A harness of a single task has no setting for it."""
    return {"task": task} if "task" in {f.name for f in fields(config)} else {}


def parse_tasks(text: str, view: View) -> tuple[str, ...]:
    """`all`, groups and tasks with commas between, in their order.

    Raises:
        ValueError: a name is neither a group nor a task.
    """
    wanted: set[str] = set()
    for word in text.split(","):
        if word in ("all", *view.groups.values()):
            wanted |= {task for task in view.tasks if word in ("all", view.groups.get(task))}
        else:
            wanted.add(view.config.make(**_of_task(view.config, word)).subject)
    return tuple(task for task in view.tasks if task in wanted)


# ---------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Outcome:
    """What became of one run.

    `done` with its score, `failed` with the reason, `busy`: another process is at it, or `unwritable`: its files cannot
    be written, so that no other run's could be.
    """

    state: str
    score: float | None = None
    reason: str = ""
    diverged: bool = False


Made = Iterable[tuple[AdapterSettings, Outcome]]
Executor = Callable[[Harness, Sequence[AdapterSettings], Session], Made]


def attempt(harness: Harness, config: AdapterSettings, session: Session) -> Outcome:
    """Make one run, in this process. What can go wrong in one run and not in the next is its outcome."""
    try:
        with harness.hushed():
            run(harness, config, session)
    except files.Busy:
        return Outcome("busy")
    except CannotWrite as error:
        return Outcome("unwritable", reason=str(error))
    except Exception as error:  # whatever it is, it is recorded and shown, and the other runs go on
        # One line: it stands in lists and tables.
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome("failed", reason=reason, diverged=isinstance(error, Diverged))
    return Outcome("done")


def run_suite(suite: Suite, session: Session, execute: Executor) -> dict[AdapterSettings, Outcome]:
    """Make all runs that `session.out` does not have yet. Several suites may work on the same folder at the same time.

    Args:
        suite: what is to be run.
        session: how; its `say` receives a line about every run, and only final runs are diagnosed.
        execute: makes runs and yields their outcomes as they come, see `executors.py`.

    Returns:
        The outcome of every run, those of selection first. Why a run failed is kept in its folder, `failure.json`; the
        same suite again tries it again.

    Raises:
        CannotWrite: the folder is full or read-only. What is there is whole, and the same suite resumes.
    """
    view, say = suite.view, session.say
    outcomes = _run_all(suite, suite.selection(), replace(session, diagnose=False), execute)
    chosen: dict[tuple[str, str], dict[str, Any]] = {}
    for task, init in itertools.product(suite.tasks, suite.inits):
        tried = {c: o for c, o in outcomes.items() if (c.subject, c.init) == (task, init)}
        scores = {c: o.score for c, o in tried.items() if o.state == "done"}
        lost = sum(o.state == "failed" and not o.diverged for o in tried.values())
        if lost:  # a choice from what is left would be another one after the next try
            say(f"{task} {init}: {lost} of {len(tried)} runs of the selection failed, so there is no final run yet")
            continue
        if tried and not scores:
            say(f"{task} {init}: every run of the selection has diverged, so there is no final run")
            continue
        # Ties go to the first of the grid.
        best = max(scores, key=lambda c: scores[c]) if scores else None
        values = best.used() if best else {}
        chosen[task, init] = {name: values[name] for name in suite.grid if name in values}
        if chosen[task, init]:
            words = ", ".join(f"{name} {value}" for name, value in chosen[task, init].items())
            say(f"{task} {init}: selected {words}, {view.score.in_words(scores[best])} of {view.selection.split}")
    return {**outcomes, **_run_all(suite, suite.final(chosen), session, execute)}


def _run_all(
    suite: Suite, configs: Sequence[AdapterSettings], session: Session, execute: Executor
) -> dict[AdapterSettings, Outcome]:
    say, view = session.say, suite.view
    folders = {config: files.open_folder(session.out, config) for config in configs}
    outcomes: dict[AdapterSettings, Outcome] = {}
    known: dict[Any, Origin] = {}  # content that runs share

    def note(config: AdapterSettings, outcome: Outcome) -> None:
        if outcome.state == "busy":
            return
        if outcome.state == "unwritable":
            raise CannotWrite(outcome.reason)
        if outcome.state == "done":
            outcome = replace(outcome, score=view.score.value(view.kept.read(folders[config])))
        else:
            files.write_failure(folders[config], config.schema, outcome.reason)
        outcomes[config] = outcome
        said = view.score.in_words(outcome.score) if outcome.state == "done" else f"FAILED {outcome.reason}"
        say(f"[{len(outcomes)}/{len(configs)}] {_name(config, view)}: {said}")

    while left := [config for config in configs if config not in outcomes]:
        free = []
        for config in left:
            if _is_finished(suite, config, folders[config], session.diagnose, known):
                note(config, Outcome("done"))
            elif not files.is_locked(folders[config]):
                free.append(config)
        for config, outcome in execute(suite.harness, free, session):
            note(config, outcome)
        if waiting := len(configs) - len(outcomes):
            say(f"{waiting} runs are with another process; looking again in {WAIT:.0f} s")
            time.sleep(WAIT)
    return outcomes


def _is_finished(suite: Suite, config: AdapterSettings, folder: Path, diagnose: bool, known: dict[Any, Origin]) -> bool:
    """Whether a run has nothing left to do; not so if its result cannot be taken."""
    try:
        result = suite.view.kept.read(folder)
        if result is None or result.get("reference_only") or (diagnose and not result["information_loss"]):
            return False
        files.check_same_run(result, config, folder)
        check_finished(result["origin"], _once(suite.harness.origin(config), known), folder)
    except ValueError:
        return False  # the run itself says what is wrong with it
    files.remove(folder, (files.FAILURE,))  # of an earlier try
    return True


def _once(parts: Iterable[Callable[[], Origin]], known: dict[Any, Origin]) -> Iterator[Callable[[], Origin]]:
    """Find content that several runs share, their data, once: equal calls, as `functools.partial` keeps them."""

    def find(part: Callable[[], Origin]) -> Origin:
        key = (part.func, part.args) if isinstance(part, partial) else part
        if key not in known:
            known[key] = part()
        return known[key]

    return (partial(find, part) for part in parts)


def _name(config: AdapterSettings, view: View) -> str:
    kind = " (selection)" if view.is_selection(config.to_dict()) else ""
    return f"{config.subject} {config.init} lr {config.lr:g} seed {config.seed}{kind}"


# --------------------------------------------------------------------------------------------------------- planning


@dataclass(frozen=True)
class Planned:
    """One run of a plan: how far it is, and why its result is no good."""

    config: AdapterSettings
    state: str
    reason: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether it would not be run."""
        return self.state in ("finished", "not readable", "another harness")


def plan(suite: Suite, out: str | Path) -> list[Planned]:
    """What the suite would run, selection first. Final runs stand there with the grid's first point."""
    words = {"not begun": "to run", "failed": "failed before"}
    planned = []
    for config in (*suite.selection(), *suite.final()):
        state = suite.view.kept.state(Path(out) / config.run_name())
        reason = "" if state.name == "failed" else state.reason  # it is tried again
        planned.append(Planned(config, words.get(state.name, state.name), reason))
    return planned
