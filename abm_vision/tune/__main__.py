"""The command line: `python -m abm_vision.tune` or `abm-tune`. Its commands are the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from abm_vision.images.commands import evaluate, predict
from abm_vision.runs import commands
from abm_vision.runs.commands import Command
from abm_vision.tune.view import VIEW

COMMANDS = commands.commands_of(
    VIEW,
    "Adapt a pretrained timm ViT to your own images.",
    {
        "predict": Command(partial(predict.parser, VIEW.program), predict.command, "classify images"),
        "evaluate": Command(partial(evaluate.parser, VIEW.program), evaluate.command, "on labelled images"),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW, COMMANDS, arguments, smaller="--batch-size, --image-size or --model")


if __name__ == "__main__":
    sys.exit(main())
