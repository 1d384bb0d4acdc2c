"""`compare`: initialisations side by side, a suite over them and over learning rates, and its table."""

from __future__ import annotations

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

from abm_vision.abm.arguments import count
from abm_vision.initializers import BASELINE
from abm_vision.runs.cli import Parser, add_settings, run_guarded, say
from abm_vision.runs.commands.suite import add_executors, executor, executor_flags
from abm_vision.runs.folder import CONFIG
from abm_vision.runs.view import View

# What is compared unless it is said otherwise.
COMPARED = {"init": "kaiming,abm", "lr": "5e-4,1e-3,2e-3,4e-3", "seeds": 3}


def _compared(view: View) -> dict[str, Any]:
    return {"task": view.config.task, **COMPARED} if len(view.tasks) > 1 else COMPARED


def parser(view: View) -> Parser:
    """What is to be compared, and the settings that all runs share."""
    flags = Parser(
        f"{view.program} compare",
        description="Train with every initialisation, learning rate and seed, and compare each initialisation at its "
        "own best rate. Finished runs are reused, interrupted ones resumed. Or compare the finished runs in given "
        "folders.",
    )
    data = f"where the data are, as --{view.place}, or " if view.place else ""
    flags.add_argument("runs", nargs="*", metavar="RUN", help=f"{data}folders of finished runs, or of several (--out)")
    texts = {
        "task": "tasks with commas between",
        "init": "initialisations with commas between, kaiming among them",
        "lr": "learning rates with commas between",
        "seeds": "number of seeds, from 0 on",
    }
    for name, default in _compared(view).items():
        text = f"{texts[name]} (default: {default})"
        flags.add_argument(f"--{name}", type=type(default), default=argparse.SUPPRESS, help=text)
    flags.add_argument("--out", default="results", help="folder of the runs (default: results)")
    flags.add_argument("--report", metavar="DIR", help="folder of compare.md, .csv and .png (default: as --out)")
    add_executors(flags)
    flags.add_argument("--json", action="store_true", help="print the rows as one line of JSON, nothing else")
    flags.add_argument("--quiet", action="store_true", help="no stages and progress bars, only the table")
    add_settings(flags, view.config, without=("task", "init", "lr", "seed"))
    return flags


def command(view: View, parsed: argparse.Namespace) -> int:
    """Make the runs that are lacking, and print the table."""
    options = vars(parsed)
    folders, out, report, as_json, quiet = (options.pop(k) for k in ("runs", "out", "report", "json", "quiet"))
    if view.place and len(folders) == 1 and not _holds_runs(Path(folders[0])):
        options[view.place] = folders.pop()

    if folders:
        from abm_vision.analysis import load

        options.pop("executor")
        if options:
            raise ValueError(f"finished runs have their settings: leave out {', '.join(options)}")
        (found, left_out), diverged = load.read_results(folders, view), []
        for name, why in left_out:
            warnings.warn(f"no result: {name} ({why})", stacklevel=1)
    else:
        found, diverged = _run(view, options, out, quiet or as_json)

    from abm_vision.analysis import compare

    compared = compare.compare(found, view, diverged)
    paths = compare.write_files(compared, report or out)
    if as_json:
        print(json.dumps(compare.records(compared)))
    else:
        print(compare.to_text(compared), *paths, sep="\n")
    return 0


def _holds_runs(folder: Path) -> bool:
    """Whether it is a run's folder, or that of several."""
    return (folder / CONFIG).is_file() or any(folder.glob(f"*/{CONFIG}"))


def _run(view: View, options: dict[str, Any], out: str, quiet: bool) -> tuple[list[dict[str, Any]], list[Any]]:
    """The results of all runs, and the settings of those that diverged.

    Raises:
        ValueError: a list is empty or has a name twice, or a run failed.
    """
    from abm_vision.runs.suite import Suite

    where = executor_flags(options)
    wanted = {name: options.pop(name, default) for name, default in _compared(view).items()}
    inits, rates = tuple(wanted["init"].split(",")), _numbers("lr", wanted["lr"])
    if BASELINE not in inits:
        raise ValueError(
            f"init is {', '.join(inits)}; {BASELINE}, which all others are compared with, must be among them"
        )
    tasks = tuple(wanted["task"].split(",")) if "task" in wanted else view.tasks
    suite = Suite(view, tasks, inits, wanted["seeds"], options, rates=rates)
    execute = executor(where)

    from abm_vision.analysis.load import read_finished
    from abm_vision.runs.harness import Session, silent
    from abm_vision.runs.run_suite import run_suite

    session = Session(out, quiet=quiet, diagnose=True, say=silent if quiet else say)
    runs = [len(tasks), len(inits), len(rates), wanted["seeds"]]
    session.say(
        f"compare   {count(math.prod(runs), 'run')}: {', '.join(inits)}, each at {count(len(rates), 'learning rate')} "
        f"with {count(wanted['seeds'], 'seed')}; --lr and --seeds ask for fewer"
    )
    outcomes = run_guarded(view.program, lambda: run_suite(suite, session, execute))
    failed = [c for c, outcome in outcomes.items() if outcome.state == "failed" and not outcome.diverged]
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(outcomes)} runs failed, so there is nothing to compare yet: "
            f"{failed[0].run_name()}: {outcomes[failed[0]].reason}"
        )
    folders = {config: f"{out}/{config.run_name()}" for config in outcomes}
    found = [read_finished(folders[config], view) for config, outcome in outcomes.items() if outcome.state == "done"]
    return found, [config for config, outcome in outcomes.items() if outcome.diverged]


def _numbers(name: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give numbers with commas between") from None
