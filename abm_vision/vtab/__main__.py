"""The command line: `python -m abm_vision.vtab` or `abm-vtab`. Its commands are the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from abm_vision.runs.cli import guarded
from abm_vision.vtab.commands import NAMES, PROGRAM


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words.pop(0) if words and words[0] in NAMES else "run"
    module = import_module(f"abm_vision.vtab.commands.{name}")
    return guarded(
        PROGRAM,
        lambda: module.command(module.parser().parse_args(words)),
        smaller="--batch-size, --image-size or --model",
    )


if __name__ == "__main__":
    sys.exit(main())
