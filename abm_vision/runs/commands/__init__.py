"""Commands that every harness has: a module each, with its `parser` and, beside it, the `command` that it is for.

Both are given the harness's `View`. The harness itself, which loads torch and a model library, is loaded when runs are
made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from abm_vision.abm.arguments import nearest
from abm_vision.analysis.view import View
from abm_vision.runs.cli import Parser, guarded, load_plugins
from abm_vision.runs.commands import compare, report, run, suite

SHARED = {
    "suite": (suite, "many runs"),
    "compare": (compare, "initialisations side by side"),
    "report": (report, "of finished runs"),
}


class Command(NamedTuple):
    """A command: its flags, what is done with their values (returns the exit code), and in words what that is."""

    parser: Callable[[], Parser]
    body: Callable[[argparse.Namespace], int]
    words: str = ""


def commands_of(
    view: View, description: str, own: Mapping[str, Command], add_flags: Callable[[Parser], None] = lambda flags: None
) -> dict[str, Command]:
    """A harness's commands by name; that of one run has none.

    Args:
        view: of the harness.
        description: what a run does.
        own: the commands that it has beside those that all have.
        add_flags: adds the flags of a run that are no settings.
    """
    shared = {
        name: Command(partial(module.parser, view), partial(module.command, view), words)
        for name, (module, words) in SHARED.items()
    }
    others = {**shared, **own}
    named = ", ".join(f"{name} ({command.words})" for name, command in others.items())
    one = partial(run.parser, view, description, f"Other commands: {named}.", add_flags)
    return {"": Command(one, partial(run.command, view)), **others}


def main(view: View, commands: Mapping[str, Command], arguments: Sequence[str] | None, smaller: str) -> int:
    """Run the command that the first word names, or the one without a name; what `--plugin` names is imported first.

    Args:
        view, commands: of the harness.
        arguments: the words; those of the command line if None.
        smaller: the flags that take less memory when they are lowered.

    Returns:
        The exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM, else the command's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = commands[words.pop(0) if words and words[0] in commands else ""]

    def work() -> int:
        if words and command is commands[""] and not words[0].startswith("-"):
            raise ValueError(f"there is no command {words[0]}{nearest(words[0], commands)}")
        load_plugins(view.program, view.config, words)
        return command.body(command.parser().parse_args(words))

    return guarded(view.program, work, smaller=smaller)
