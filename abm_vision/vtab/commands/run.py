"""`abm-vtab`: one run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from abm_vision.runs.cli import Parser, add_run_options, add_settings, print_config, run_guarded, say, settings_of
from abm_vision.runs.log import opened
from abm_vision.vtab.commands import PROGRAM
from abm_vision.vtab.config import RunConfig

EPILOG = (
    "Other commands: suite (many tasks, starts and seeds), report (of finished runs), compare (starts side by side), "
    "prepare (fetch data sets, or write them as image folders), list (the tasks and where their data is), predict "
    "(classify image files)."
)


def parser() -> Parser:
    """One flag for every field of `RunConfig`, and those that do not change a result."""
    flags = Parser("abm-vtab", description="Adapt a pretrained timm ViT to a VTAB-1K task.", epilog=EPILOG)
    add_settings(flags, RunConfig)
    add_run_options(flags)
    return flags


def command(parsed: argparse.Namespace) -> int:
    """Make a run, and print its result."""
    options = vars(parsed)
    keys = ("out", "rerun", "diagnose", "log", "json", "quiet")
    out, rerun, diagnose, kind, as_json, quiet = (options.pop(key) for key in keys)
    config = settings_of(options, RunConfig)
    quiet = quiet or as_json
    if not quiet:
        print_config(config)

    from abm_vision.vtab.run import run  # imports timm: `--help` and a wrong flag answer at once

    note = None if quiet else say
    with opened(kind, Path(out) / config.run_name()) as log:
        result = run_guarded(
            PROGRAM, lambda: run(config, out, rerun=rerun, quiet=quiet, diagnose=diagnose, say=note, log=log)
        )
    print(json.dumps(result) if as_json else summary(result))
    return 0


def summary(result: dict[str, Any]) -> str:
    """The run in one line, with what kind of data it was tested on, and where its files are."""
    test, config = result["test"], result["config"]
    data = result["data"]["test"]
    images = f"{test['count']} {test['split']} images"
    return (
        f"{config['task']} [{data['source']}]  top-1 {100 * test['top1']:.2f} % of {images}  "
        f"init {config['init']}  seed {config['seed']}  {sum(result['seconds'].values()):.0f} s  {result['folder']}"
    )
