"""The command line: `python -m nlp_ext.glue` or `abm-glue`. The only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from abm_vision.runs.cli import (
    Parser,
    add_run_options,
    add_settings,
    guarded,
    make_run,
)
from nlp_ext.glue.config import GlueConfig

PROGRAM = "abm-glue"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(PROGRAM, lambda: _run(words), smaller="--batch-size, --source-tokens or --model")


def parser() -> Parser:
    """One flag for every field of `GlueConfig`, and those that do not change a result."""
    flags = Parser(PROGRAM, description="Adapt a T5 to a task of GLUE, as text to text.")
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


def _run(words: list[str]) -> int:
    return make_run(parser().parse_args(words), GlueConfig, "nlp_ext.glue.harness:HARNESS")


if __name__ == "__main__":
    sys.exit(main())
