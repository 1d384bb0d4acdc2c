"""`evaluate`: an adapter on labelled images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from abm_vision.images.commands.predict import add_classifier, add_reading, report_skipped
from abm_vision.runs.cli import Parser, say


def parser(program: str) -> Parser:
    """An adapter, and images by class."""
    flags = Parser(
        f"{program} evaluate",
        description="Classify labelled images with the adapter of a run: top-1, a table by class and, as pictures, the "
        "confusions and the surest mistakes.",
    )
    add_classifier(flags)
    flags.add_argument("folder", metavar="FOLDER", help="images by class, as for training; its test part if it has one")
    flags.add_argument("--out", default="evaluation", metavar="DIR", help="folder of the files (default: evaluation)")
    add_reading(flags)
    flags.add_argument("--json", action="store_true", help="print the numbers as JSON, nothing else")
    return flags


def command(options: argparse.Namespace) -> int:
    """Write the files, and print the table."""
    from tabulate import tabulate

    from abm_vision.images.evaluate import evaluate, write_files
    from abm_vision.runs.device import resolve_device

    found = evaluate(
        options.adapter,
        options.folder,
        weights=options.weights,
        device=resolve_device(options.device),
        skip_broken=options.skip_broken,
    )
    report_skipped(found.skipped)
    files = write_files(found, Path(options.out))
    if options.json:
        print(json.dumps(found.numbers()))
        return 0
    part = f" {found.part}" if found.part else ""
    correct = int((found.labels == found.predicted).sum())
    say(f"top-1 {100 * found.top1:.2f} %: {correct} of {len(found.labels)}{part} images")
    say(tabulate([_shown(row) for row in found.rows()], headers="keys", disable_numparse=True))
    for file in files:
        say(str(file))
    return 0


def _shown(row: dict[str, object]) -> dict[str, str]:
    """A row with shares in per cent."""
    return {
        name.replace("_", " "): ""
        if value is None
        else f"{100 * value:.1f} %"
        if isinstance(value, float)
        else str(value)
        for name, value in row.items()
    }
