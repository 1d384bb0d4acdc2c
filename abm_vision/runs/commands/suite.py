"""`suite`: many runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from abm_vision.abm.arguments import are, count
from abm_vision.initializers import BASELINE
from abm_vision.runs.cli import Parser, add_place, add_settings, run_guarded, say, value_of
from abm_vision.runs.suite import Suite, parse_tasks, plan
from abm_vision.runs.view import View

if TYPE_CHECKING:
    from abm_vision.runs.harness import Session
    from abm_vision.runs.run_suite import Executor, Outcome
    from abm_vision.runs.settings import AdapterSettings

LOCAL_FLAGS = ("jobs",)
RAY_FLAGS = {"cpus_per_run": "cpus", "gpus_per_run": "gpus", "ray_address": "address"}  # to those of `on_ray`


def parser(view: View) -> Parser:
    """What is to be run, how, and the settings that all runs share."""
    flags = Parser(
        f"{view.program} suite",
        description="Run tasks, initialisations and seeds. Finished runs are reused, interrupted ones resumed, failed "
        "ones are recorded and do not stop the rest; several suites may share one --out.",
    )
    add_place(flags, view.place)
    if len(view.tasks) > 1:
        choices = ", ".join(["all", *dict.fromkeys(view.groups.values())])
        flags.add_argument("--tasks", default="all", help=f"{choices}, or names with commas between (default: all)")
    default = f"abm,{BASELINE}"
    flags.add_argument("--init", default=default, help=f"initialisations with commas between (default: {default})")
    flags.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 0, 1, ... (default: 1)")
    text = f"choose this setting on {view.selection.split}, for every task from the same values; may be repeated"
    help_text = text if view.selection.settings else argparse.SUPPRESS  # it is there to be refused with a reason
    flags.add_argument("--grid", action="append", default=[], metavar="SETTING=A,B", help=help_text)
    add_settings(flags, view.config, without=view.set_by_suite)
    flags.add_argument("--out", default="results", help="folder of the runs (default: results)")
    flags.add_argument("--diagnose", action="store_true", help="measure the information loss of every initialisation")
    add_executors(flags)
    instead = flags.add_mutually_exclusive_group()
    instead.add_argument("--dry-run", action="store_true", help="list the runs and the time they are likely to take")
    if view.smoke.settings:
        text = "see whether they can be made: one step of each on a handful of samples, with one seed; nothing is kept"
        instead.add_argument("--smoke", action="store_true", help=text)
    flags.add_argument("--quiet", action="store_true", help="nothing but the failures")
    return flags


def add_executors(flags: Parser) -> None:
    """Where runs are made."""
    flags.add_argument("--executor", choices=("local", "ray"), default="local", help="where (default: local)")
    unset = {"default": argparse.SUPPRESS}  # a flag of the other executor is reported, not passed over
    flags.add_argument("--jobs", type=int, **unset, help="local: runs at a time (default: 1)")
    flags.add_argument("--ray-address", **unset, help="ray: the cluster's address (default: found, or started here)")
    flags.add_argument("--cpus-per-run", type=float, **unset, help="ray: CPUs that a run takes (default: 1)")
    flags.add_argument("--gpus-per-run", type=float, **unset, help="ray: GPUs, or a fraction (default: 0)")


def executor_flags(options: dict[str, Any]) -> dict[str, Any]:
    """Take the flags that say what makes the runs out of `options`."""
    return {name: options.pop(name) for name in ("executor", *LOCAL_FLAGS, *RAY_FLAGS) if name in options}


def executor(flags: dict[str, Any]) -> Executor:
    """What makes the runs.

    Raises:
        ValueError: a flag is for another executor, or as the executors do.
    """
    given = dict(flags)
    kind = given.pop("executor")
    others = LOCAL_FLAGS if kind == "ray" else RAY_FLAGS
    foreign = [f"--{name.replace('_', '-')}" for name in given if name in others]
    if foreign:
        raise ValueError(f"{are(foreign)} not for --executor {kind}")

    from abm_vision.runs import executors

    if kind == "ray":
        return executors.on_ray(**{RAY_FLAGS[name]: value for name, value in given.items()})
    jobs = given.get("jobs", 1)
    return executors.in_this_process if jobs == 1 else executors.local(jobs)


def command(view: View, parsed: argparse.Namespace) -> int:
    """Make the runs; the exit code is 1 if one of them failed."""
    options = vars(parsed)
    init, seeds, grid, out, diagnose, dry_run, quiet = (
        options.pop(name) for name in "init seeds grid out diagnose dry_run quiet".split()
    )
    tasks, smoke = options.pop("tasks", "all"), options.pop("smoke", False)
    where = executor_flags(options)
    wanted = Suite(view, parse_tasks(tasks, view), tuple(init.split(",")), seeds, options, _grid(view, grid))
    execute = executor(where)
    if dry_run:
        _print_plan(wanted, out)
        return 0

    from abm_vision.runs.harness import Session, silent
    from abm_vision.runs.run_suite import run_suite

    session = Session(out, diagnose=diagnose, say=silent if quiet else say)
    if smoke:
        return _smoke(wanted.smoke(), session, execute)
    outcomes = run_guarded(view.program, lambda: run_suite(wanted, session, execute))
    failed = _print_failed(outcomes)
    session.say(f"{count(len(outcomes) - failed, 'run')} finished, {failed} failed; results in {out}")
    return 1 if failed else 0


def _smoke(suite: Suite, session: Session, execute: Executor) -> int:
    """Make the runs of one step in a folder below `--out`, which all that make runs must see, and delete it."""
    from abm_vision.abm.files import writing
    from abm_vision.runs.run_suite import run_suite

    out = Path(session.out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        beside = TemporaryDirectory(prefix=".smoke-", dir=out)
    with beside as folder:
        session = replace(session, out=folder, diagnose=False)
        outcomes = run_guarded(suite.view.program, lambda: run_suite(suite, session, execute))
    failed = _print_failed(outcomes)
    session.say(f"{count(len(outcomes) - failed, 'run')} of one step can be made, {failed} cannot; nothing is kept")
    return 1 if failed else 0


def _print_failed(outcomes: Mapping[AdapterSettings, Outcome]) -> int:
    """Why runs failed, a line each; returns how many have."""
    failed = {config: outcome for config, outcome in outcomes.items() if outcome.state == "failed"}
    for config, outcome in failed.items():
        print(f"failed: {config.run_name()}: {outcome.reason}", file=sys.stderr)
    return len(failed)


def _grid(view: View, words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`lr=1e-3,2e-3` to {"lr": (0.001, 0.002)}, by the type of the setting."""
    kinds = {name: value_of(setting) for name, setting in view.config.settings().items()}
    grid: dict[str, tuple[Any, ...]] = {}
    for word in words:
        flag, _, values = word.partition("=")
        name = flag.replace("-", "_")
        if name in grid:
            raise ValueError(f"--grid names {name} twice: give all its values at once, with commas between")
        if name not in kinds or not values:
            raise ValueError(f"--grid {word!r} is not SETTING=A,B with a setting of a run, such as lr=1e-3,2e-3")
        try:
            grid[name] = tuple(kinds[name](value) for value in values.split(","))
        except ValueError:
            raise ValueError(f"--grid {word!r}: {name} takes values of type {kinds[name].__name__}") from None
    return grid


def _print_plan(suite: Suite, out: str) -> None:
    estimate, origin = suite.estimate(out)
    planned = plan(suite, out)
    times = {one.config: estimate(one.config) for one in planned if not one.is_settled} if estimate else {}
    for one in planned:
        kind = "selection" if suite.view.is_selection(one.config.to_dict()) else "final"
        minutes = f" {times.get(one.config, 0.0) / 60:7.1f} min" if estimate else ""
        print(f"{one.config.run_name():<44} {kind:<10} lr {one.config.lr:<8g} {one.state:<14}{minutes}")
    for one in planned:
        if one.reason:
            print(one.reason, file=sys.stderr)
    finished = sum(one.state == "finished" for one in planned)
    hours = f"about {sum(times.values()) / 3600:.1f} h one after another, {origin}"
    print(f"{count(len(planned), 'run')}, {finished} finished; {hours if estimate else origin}")
