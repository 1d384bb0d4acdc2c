"""The command line: `python -m abm_vision.vtab` or `abm-vtab`. Its commands are the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

from abm_vision.export import commands as export
from abm_vision.images.commands import evaluate, predict
from abm_vision.runs import commands
from abm_vision.runs.commands import Command
from abm_vision.vtab.commands import list as tasks
from abm_vision.vtab.commands import prepare
from abm_vision.vtab.view import VIEW

COMMANDS = commands.commands_of(
    VIEW,
    "Adapt a pretrained timm ViT to a VTAB-1K task.",
    {
        "prepare": Command(prepare.parser, prepare.command, "fetch datasets, or write them as image folders"),
        "list": Command(tasks.parser, tasks.command, "the tasks and where their data is"),
        "predict": Command(partial(predict.parser, VIEW.program), predict.command, "classify images"),
        "evaluate": Command(partial(evaluate.parser, VIEW.program), evaluate.command, "on labelled images"),
        "export": Command(partial(export.export_parser, VIEW.program), export.command, "as ONNX, .pt2 or for timm"),
        "merge": Command(partial(export.merge_parser, VIEW.program), export.command, "as a checkpoint for timm"),
    },
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW, COMMANDS, arguments, smaller="--batch-size, --image-size or --model")


if __name__ == "__main__":
    sys.exit(main())
