"""Commands that every harness has: a module each, with its `parser` and, beside it, the `command` that it is for.

Both are given the harness's `View`; the harness itself, which loads torch and a model library, is resolved when runs
are made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import NamedTuple

from abm_vision.runs.cli import Parser, guarded
from abm_vision.runs.view import View

SHARED = ("compare", "report", "suite")


class Command(NamedTuple):
    """Its flags, and what is done with their values; returns the exit code."""

    parser: Callable[[], Parser]
    body: Callable[[argparse.Namespace], int]


def shared(view: View) -> dict[str, Command]:
    """The commands that every harness has, by name."""
    modules = {name: import_module(f"{__name__}.{name}") for name in SHARED}
    return {name: Command(partial(m.parser, view), partial(m.command, view)) for name, m in modules.items()}


def main(program: str, commands: Mapping[str, Command], arguments: Sequence[str] | None, smaller: str) -> int:
    """Run the command that the first word names, or the one without a name.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, else the command's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = commands[words.pop(0) if words and words[0] in commands else ""]
    return guarded(program, lambda: command.body(command.parser().parse_args(words)), smaller=smaller)
