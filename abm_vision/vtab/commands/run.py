"""`abm-vtab`: one run."""

from __future__ import annotations

import argparse

from abm_vision.runs.cli import Parser, add_run_options, add_settings, make_run
from abm_vision.vtab.commands import PROGRAM
from abm_vision.vtab.config import RunConfig
from abm_vision.vtab.view import VIEW

EPILOG = (
    "Other commands: suite (many tasks, initialisations and seeds), report (of finished runs), compare "
    "(initialisations side by side), prepare (fetch datasets, or write them as image folders), list (the tasks and "
    "where their data is), predict (classify image files)."
)


def parser() -> Parser:
    """One flag for every field of `RunConfig`, and those that do not change a result."""
    flags = Parser(PROGRAM, description="Adapt a pretrained timm ViT to a VTAB-1K task.", epilog=EPILOG)
    add_settings(flags, RunConfig)
    add_run_options(flags)
    return flags


def command(options: argparse.Namespace) -> int:
    """Make a run, and print its result."""
    return make_run(VIEW, options)
