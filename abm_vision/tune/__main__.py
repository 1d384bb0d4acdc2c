"""The command line: `python -m abm_vision.tune` or `abm-tune`. Its commands are the only place that prints."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from abm_vision.export import commands as export
from abm_vision.images.commands import demo, evaluate, predict
from abm_vision.runs import commands
from abm_vision.runs.cli import Parser, run_guarded, say
from abm_vision.runs.commands import Command, run
from abm_vision.tune.config import AUTO, SWEPT
from abm_vision.tune.view import VIEW

_ALL = commands.commands_of(
    VIEW,
    "Adapt a pretrained timm ViT to your own images.",
    {
        "predict": Command(partial(predict.parser, VIEW.program), predict.command, "classify images"),
        "evaluate": Command(partial(evaluate.parser, VIEW.program), evaluate.command, "on labelled images"),
        "export": Command(partial(export.export_parser, VIEW.program), export.command, "as ONNX, .pt2 or for timm"),
        "demo": Command(partial(demo.parser, VIEW.program), demo.command, "in a browser"),
        "merge": Command(partial(export.merge_parser, VIEW.program), export.command, "as a checkpoint for timm"),
    },
)


def _parser() -> Parser:
    """That of one run, with a learning rate that may be `auto`."""
    flags = _ALL[""].parser()
    (rate,) = (action for action in flags._actions if action.dest == "lr")
    rate.type = _rate
    rate.help += f"; auto: the best on validation of {', '.join(f'{r:g}' for r in SWEPT)}, in short runs"
    return flags


def _rate(text: str) -> str | float:
    try:
        return text if text == AUTO else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor {AUTO}") from None


def _one(parsed: argparse.Namespace) -> int:
    """Make the run, with the rate chosen first where that is asked for."""
    if getattr(parsed, "lr", None) == AUTO:
        how = ("out", "rerun", "diagnose", "log", "json", "quiet", "print_config", "lr")
        settings = run.settings_of({k: v for k, v in vars(parsed).items() if k not in how}, VIEW)

        from abm_vision.runs.harness import silent
        from abm_vision.tune.rate import choose_rate

        quiet = parsed.quiet or parsed.json or parsed.print_config
        parsed.lr = run_guarded(VIEW.program, lambda: choose_rate(settings, parsed.out, silent if quiet else say))
    return run.command(VIEW, parsed)


COMMANDS = {**_ALL, "": Command(_parser, _one)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    return commands.main(VIEW, COMMANDS, arguments, smaller="--batch-size, --image-size or --model")


if __name__ == "__main__":
    sys.exit(main())
