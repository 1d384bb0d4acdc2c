"""`abm-vtab compare`: initialisations side by side."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from abm_vision.runs.cli import Parser, add_settings, run_guarded, say
from abm_vision.vtab.commands import PROGRAM
from abm_vision.vtab.config import RunConfig

# What is compared unless it is said otherwise.
COMPARED = {"task": RunConfig.task, "init": "kaiming,abm", "lr": "5e-4,1e-3,2e-3,4e-3", "seeds": 3}


def parser() -> Parser:
    """What is to be compared, and the settings that all runs share."""
    flags = Parser(
        "abm-vtab compare",
        description="Train every start with every learning rate and seed, and compare each at its own best rate. "
        "Finished runs are reused, a killed comparison goes on. Or compare the finished runs in given folders.",
    )
    flags.add_argument("runs", nargs="*", metavar="RUN", help="folders of finished runs, instead of running any")
    for name, text in {
        "task": "tasks with commas between",
        "init": "starts with commas between, kaiming among them",
        "lr": "learning rates with commas between",
        "seeds": "number of seeds, from 0 on",
    }.items():
        default = COMPARED[name]
        kind = type(default)
        flags.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=f"{text} (default: {default})")
    flags.add_argument("--out", default="results", help="folder of the runs (default: results)")
    flags.add_argument("--report", metavar="DIR", help="folder of compare.md, .csv and .png (default: as --out)")
    flags.add_argument("--json", action="store_true", help="print the rows as one line of JSON, nothing else")
    flags.add_argument("--quiet", action="store_true", help="no stages and progress bars, only the table")
    add_settings(flags, RunConfig, without=("task", "init", "lr", "seed"))
    return flags


def command(parsed: argparse.Namespace) -> int:
    """Make the runs that are lacking, and print the table."""
    options = vars(parsed)
    runs, out, report, as_json, quiet = (options.pop(k) for k in ("runs", "out", "report", "json", "quiet"))

    from abm_vision.vtab import HARNESS, compare, comparison

    if runs:
        if options:
            raise ValueError(f"finished runs have their settings: leave out {', '.join(options)}")
        found, diverged = [HARNESS.read_finished(folder) for folder in runs], []
    else:
        quiet = quiet or as_json
        task, init, lr, seeds = (options.pop(name, default) for name, default in COMPARED.items())
        note = None if quiet else say
        inits, rates = init.split(","), _numbers("lr", lr)
        found, diverged = run_guarded(
            PROGRAM, lambda: compare.run_all(task.split(","), inits, seeds, rates, options, out, quiet=quiet, say=note)
        )
    compared = comparison.compare(found, diverged)
    paths = compare.write_report(compared, report or out)
    if as_json:
        print(json.dumps([asdict(row) for row in compared.rows]))
    else:
        print(compare.to_text(compared), *paths, sep="\n")
    return 0


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} is {text!r}; give numbers with commas between") from None
