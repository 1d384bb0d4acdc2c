"""`abm-vtab suite`: many runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from abm_vision.runs.cli import Parser, add_settings, run_guarded, say
from abm_vision.vtab.commands import PROGRAM
from abm_vision.vtab.config import SET_BY_SUITE, RunConfig

LOCAL_FLAGS = ("jobs",)
RAY_FLAGS = {"cpus_per_run": "cpus", "gpus_per_run": "gpus", "ray_address": "address"}  # to those of `on_ray`


def parser() -> Parser:
    """What is to be run, how, and the settings that all runs share."""
    flags = Parser(
        "abm-vtab suite",
        description="Run tasks, starts and seeds after the protocol of VTAB-1K. Finished runs are reused, killed ones "
        "go on, failed ones are recorded and do not stop the rest; several suites may share one --out.",
    )
    flags.add_argument("--tasks", default="all", help="all, natural, specialized, structured, or names (default: all)")
    flags.add_argument("--init", default="abm,kaiming", help="starts with commas between (default: abm,kaiming)")
    flags.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds 0, 1, ... (default: 1)")
    flags.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="SETTING=A,B",
        help="choose this setting on train800/val200, for every task from the same values; may be given several times",
    )
    add_settings(flags, RunConfig, without=SET_BY_SUITE)
    flags.add_argument("--out", default="results", help="folder of the runs (default: results)")
    flags.add_argument("--diagnose", action="store_true", help="measure the information loss of every start")
    flags.add_argument("--executor", choices=("local", "ray"), default="local", help="where (default: local)")
    unset = {"default": argparse.SUPPRESS}  # a flag of the other executor is told, not passed over
    flags.add_argument("--jobs", type=int, **unset, help="local: runs at a time (default: 1)")
    flags.add_argument("--ray-address", **unset, help="ray: the cluster's address (default: found, or started here)")
    flags.add_argument("--cpus-per-run", type=float, **unset, help="ray: CPUs that a run takes (default: 1)")
    flags.add_argument("--gpus-per-run", type=float, **unset, help="ray: GPUs, or a fraction (default: 0)")
    flags.add_argument("--dry-run", action="store_true", help="list the runs and the time they are likely to take")
    flags.add_argument("--quiet", action="store_true", help="nothing but the failures")
    return flags


def command(parsed: argparse.Namespace) -> int:
    """Make the runs; the exit code is 1 if one of them failed."""
    options = vars(parsed)
    tasks, init, seeds, grid, out, diagnose, executor, dry_run, quiet = (
        options.pop(name) for name in "tasks init seeds grid out diagnose executor dry_run quiet".split()
    )
    given = {name: options.pop(name) for name in (*LOCAL_FLAGS, *RAY_FLAGS) if name in options}
    others = LOCAL_FLAGS if executor == "ray" else RAY_FLAGS
    foreign = [f"--{name.replace('_', '-')}" for name in given if name in others]
    if foreign:
        raise ValueError(f"{', '.join(foreign)} is not for --executor {executor}")

    from abm_vision.vtab import executors, suite

    wanted = suite.Suite(
        suite.parse_tasks(tasks), tuple(init.split(",")), seeds, options, _grid(grid), diagnose=diagnose
    )
    if dry_run:
        _print_plan(wanted, out)
        return 0
    if executor == "ray":
        execute = executors.on_ray(**{RAY_FLAGS[name]: value for name, value in given.items()})
    elif given.get("jobs", 1) == 1:
        execute = executors.in_this_process(None if quiet else say)
    else:
        execute = executors.local(given["jobs"])
    note = (lambda line: None) if quiet else say
    outcomes = run_guarded(PROGRAM, lambda: suite.run_suite(wanted, out, execute, note))
    failed = {config: outcome for config, outcome in outcomes.items() if outcome.state == "failed"}
    for config, outcome in failed.items():
        print(f"failed: {config.run_name()}: {outcome.reason}", file=sys.stderr)
    if not quiet:
        say(f"{len(outcomes) - len(failed)} runs finished, {len(failed)} failed; results in {out}")
    return 1 if failed else 0


def _grid(words: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """`lr=1e-3,2e-3` to {"lr": (0.001, 0.002)}, by the type of the setting."""
    kinds = {f.name: {"int": int, "float": float}.get(str(f.type), str) for f in fields(RunConfig)}
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


def _print_plan(wanted: Any, out: str) -> None:
    from abm_vision.vtab import suite

    throughput, origin = suite.measure(wanted, out)
    planned = suite.plan(wanted, out, throughput)
    for one in planned:
        kind = "selection" if one.config.evaluate == "val" else "final"
        print(
            f"{one.config.run_name():<44} {kind:<10} lr {one.config.lr:<8g} {one.state:<14} {one.seconds / 60:7.1f} min"
        )
    for one in planned:
        if one.reason:
            print(one.reason, file=sys.stderr)
    hours = sum(one.seconds for one in planned) / 3600
    finished = sum(one.state == "finished" for one in planned)
    speed = f"{throughput['train']:.0f} images/s in training and {throughput['test']:.0f} in testing ({origin})"
    print(
        f"{len(planned)} runs, {finished} finished; about {hours:.1f} h one after another, at {speed}; drawing or "
        "decoding images for the first time is extra"
    )
