"""The command line: `python -m nlp_ext.glue` or `abm-glue`. The only place that prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abm_vision.runs.cli import (
    Parser,
    add_run_options,
    add_settings,
    guarded,
    print_config,
    run_guarded,
    say,
    settings_of,
)
from abm_vision.runs.log import opened
from nlp_ext.glue.config import GlueConfig

PROGRAM = "abm-glue"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(PROGRAM, lambda: _run(words), smaller="--batch-size, --source-tokens or --model")


def parser() -> Parser:
    """One flag for every field of `GlueConfig`, and those that do not change a result."""
    flags = Parser(PROGRAM, description="Adapt a T5 to a task of GLUE, as text to text.")
    add_settings(flags, GlueConfig)
    add_run_options(flags)
    flags.add_argument(
        "--test", action="store_true", help="write predictions for the test splits, as the GLUE server takes them"
    )
    return flags


def _run(words: list[str]) -> int:
    options = vars(parser().parse_args(words))
    keys = ("out", "rerun", "diagnose", "log", "json", "quiet", "test")
    out, rerun, diagnose, kind, as_json, quiet, test = (options.pop(key) for key in keys)
    config = settings_of(options, GlueConfig)
    quiet = quiet or as_json
    if not quiet:
        print_config(config)

    from nlp_ext.glue import run as module  # imports the Trainer: `--help` and a wrong flag answer sooner
    from nlp_ext.quiet import only_our_own_words

    note = None if quiet else say
    with only_our_own_words(), opened(kind, Path(out) / config.run_name()) as log:
        result = run_guarded(
            PROGRAM,
            lambda: module.run(config, out, rerun=rerun, quiet=quiet, diagnose=diagnose, test=test, say=note, log=log),
        )
    print(json.dumps(result) if as_json else summary(result))
    return 0


def summary(result: dict[str, Any]) -> str:
    """The run in one line, with what kind of data and model it is about, and where its files are."""
    from nlp_ext.glue.run import scores_in_words

    config = result["config"]
    tiny = ", tiny stand-in model" if result["tiny"] else ""
    return (
        f"{config['task']} [{result['data']['train']['source']}{tiny}]  {scores_in_words(result)}  init "
        f"{config['init']}  seed {config['seed']}  {sum(result['seconds'].values()):.0f} s  {result['folder']}"
    )


if __name__ == "__main__":
    sys.exit(main())
