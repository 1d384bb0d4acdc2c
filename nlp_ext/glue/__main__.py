"""The command line: `python -m nlp_ext.glue` or `abm-glue`. Commands are the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from abm_vision.runs import commands
from abm_vision.runs.cli import Parser
from nlp_ext import textview
from nlp_ext.glue.view import VIEW


def _add_flags(flags: Parser) -> None:
    textview.add_flags(flags)
    flags.add_argument(
        "--test",
        dest="extras",
        action="store_const",
        const=("server",),
        default=(),
        help="write predictions for the test splits, as the GLUE server takes them",
    )


COMMANDS = commands.commands_of(VIEW, "Adapt a T5 to a task of GLUE, as text to text.", {}, _add_flags)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW, COMMANDS, arguments, smaller="--batch-size, --source-tokens or --model")


if __name__ == "__main__":
    sys.exit(main())
