"""The command line: `python -m abm_vision.tune` or `abm-tune`. Its commands are the only place that prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from abm_vision.runs import commands
from abm_vision.tune.view import VIEW

COMMANDS = commands.commands_of(VIEW, "Adapt a pretrained timm ViT to your own images.", {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW, COMMANDS, arguments, smaller="--batch-size, --image-size or --model")


if __name__ == "__main__":
    sys.exit(main())
