"""The runs of a suite, which survives whatever happens to one of them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from abm_vision.abm.arguments import count
from abm_vision.abm.files import CannotWrite
from abm_vision.runs import folder as files
from abm_vision.runs.content import Origin, check_finished
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Harness, Say, Session
from abm_vision.runs.run import run
from abm_vision.runs.settings import AdapterSettings
from abm_vision.runs.suite import Suite, plan
from abm_vision.runs.view import View

WAIT = 5.0  # seconds until a run that another process is at is looked at again


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
        ValueError: the data of runs that are left cannot be read; none is made.
        CannotWrite: the folder is full or read-only. What is there is whole, and the same suite resumes.
    """
    _check_data(suite, session.out)
    outcomes = _run_all(suite, suite.selection(), replace(session, diagnose=False), execute)
    return {**outcomes, **_run_all(suite, suite.final(_choose(suite, outcomes, session.say)), session, execute)}


def _check_data(suite: Suite, out: str | Path) -> None:
    """Raise a ValueError if the data of runs that are left cannot be read: once, not once a run."""
    left = [one.config for one in plan(suite, out) if not one.is_settled]
    if suite.grid and not any(suite.view.is_selection(config.to_dict()) for config in left):
        return  # the final runs are those of chosen settings, not of the plan
    parts = {(part.func, part.args): config.subject for config in left for part in suite.harness.data(config)}
    lacking: dict[str, str] = {}
    for (read, arguments), subject in parts.items():
        try:
            if subject not in lacking:
                read(*arguments)
        except (ValueError, OSError) as error:
            lacking[subject] = str(error)
    if lacking:
        subject, why = next(iter(lacking.items()))
        raise ValueError(f"no run is made, as the data of {', '.join(lacking)} cannot be read. {subject}: {why}")


def _choose(suite: Suite, outcomes: Mapping[AdapterSettings, Outcome], say: Say) -> dict[tuple[str, str], Any]:
    """The settings of the best run of the selection for each (task, initialisation) that has one."""
    view, chosen = suite.view, {}
    for task, init in itertools.product(suite.tasks, suite.inits):
        tried = {c: o for c, o in outcomes.items() if (c.subject, c.init) == (task, init)}
        scores = {c: o.score for c, o in tried.items() if o.state == "done"}
        lost = sum(o.state == "failed" and not o.diverged for o in tried.values())
        if lost:  # a choice from what is left would be another one after the next try
            say(f"{task} {init}: {lost} of {len(tried)} runs of the selection failed, so there is no final run yet")
        elif scores:
            best = max(scores, key=lambda c: scores[c])  # ties go to the first of the grid
            values = best.used()
            chosen[task, init] = {name: values[name] for name in suite.grid if name in values}
            words = ", ".join(f"{name} {value}" for name, value in chosen[task, init].items())
            if words:
                say(f"{task} {init}: selected {words}, {view.score.in_words(scores[best])} of {view.selection.split}")
        elif tried:
            say(f"{task} {init}: every run of the selection has diverged, so there is no final run")
        else:  # there is nothing to choose
            chosen[task, init] = {}
    return chosen


def _run_all(
    suite: Suite, configs: Sequence[AdapterSettings], session: Session, execute: Executor
) -> dict[AdapterSettings, Outcome]:
    say, view = session.say, suite.view
    folders = {config: files.open_folder(session.out, config) for config in configs}
    outcomes: dict[AdapterSettings, Outcome] = {}
    shared = cache(lambda find, *arguments: find(*arguments))  # content that several runs have is found once

    def note(config: AdapterSettings, outcome: Outcome) -> None:
        if outcome.state == "busy":
            return
        if outcome.state == "unwritable":
            raise CannotWrite(outcome.reason)
        if outcome.state == "done":
            outcome = replace(outcome, score=view.score.value(view.kept.read(folders[config])))
            said = view.score.in_words(outcome.score)
        else:
            files.write_failure(folders[config], config.schema, outcome.reason)
            said = f"FAILED {outcome.reason}"
        outcomes[config] = outcome
        say(f"[{len(outcomes)}/{len(configs)}] {_name(config, view)}: {said}")

    while left := [config for config in configs if config not in outcomes]:
        free = []
        for config in left:
            if _is_finished(suite, config, folders[config], session.diagnose, shared):
                note(config, Outcome("done"))
            elif not files.is_locked(folders[config]):
                free.append(config)
        for config, outcome in execute(suite.harness, free, session):
            note(config, outcome)
        if waiting := len(configs) - len(outcomes):
            say(f"waiting for {count(waiting, 'run')} of another process; looking again in {WAIT:.0f} s")
            time.sleep(WAIT)
    return outcomes


def _is_finished(
    suite: Suite, config: AdapterSettings, folder: Path, diagnose: bool, shared: Callable[..., Origin]
) -> bool:
    """Whether a run has nothing left to do; not so if its result cannot be taken."""
    try:
        result = suite.view.kept.read(folder)
        if result is None or result.get("reference_only") or (diagnose and not result["information_loss"]):
            return False
        files.check_same_run(result, config, folder)
        parts = [partial(shared, part.func, *part.args) for part in suite.harness.origin(config)]
        check_finished(result["origin"], parts, folder)
    except ValueError:
        return False  # the run itself says what is wrong with it
    files.remove(folder, (files.FAILURE,))  # of an earlier try
    return True


def _name(config: AdapterSettings, view: View) -> str:
    kind = " (selection)" if view.is_selection(config.to_dict()) else ""
    return f"{config.subject} {config.init} lr {config.lr:g} seed {config.seed}{kind}"
