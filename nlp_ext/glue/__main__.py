"""The command line: `python -m nlp_ext.glue` or `abm-glue`. Commands are the only place that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from abm_vision.runs import commands
from abm_vision.runs.cli import Parser, add_run_options, add_settings, make_run
from nlp_ext.glue.config import GlueConfig
from nlp_ext.glue.view import VIEW

OTHERS = "suite (many runs), compare (initialisations side by side), report (of finished runs)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW.program, COMMANDS, arguments, smaller="--batch-size, --source-tokens or --model")


def parser() -> Parser:
    """One flag for every field of `GlueConfig`, and those that do not change a result."""
    flags = Parser(
        VIEW.program, description="Adapt a T5 to a task of GLUE, as text to text.", epilog=f"Other commands: {OTHERS}."
    )
    add_settings(flags, GlueConfig)
    add_run_options(flags)
    flags.add_argument(
        "--test",
        dest="extras",
        action="store_const",
        const=("server",),
        default=(),
        help="write predictions for the test splits, as the GLUE server takes them",
    )
    return flags


def run(options: argparse.Namespace) -> int:
    """Make a run, and print its result."""
    return make_run(VIEW, options)


COMMANDS = {"": commands.Command(parser, run), **commands.shared(VIEW)}

if __name__ == "__main__":
    sys.exit(main())
