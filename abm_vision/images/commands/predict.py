"""`predict`: classify image files."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

from abm_vision.runs.cli import Parser, say


def parser(program: str) -> Parser:
    """An adapter, and images."""
    flags = Parser(f"{program} predict", description="Classify images with the adapter of a run.")
    add_classifier(flags)
    flags.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="image files, or folders of them")
    flags.add_argument("--top", type=int, default=1, help="most likely classes to give (default: 1)")
    add_reading(flags)
    shape = flags.add_mutually_exclusive_group()
    shape.add_argument("--csv", action="store_true", help="print CSV: image, rank, class, probability")
    shape.add_argument("--json", action="store_true", help="print JSON")
    return flags


def add_classifier(flags: Parser) -> None:
    """What `load_classifier` takes."""
    flags.add_argument("adapter", metavar="ADAPTER", help="a run's folder, or the adapter's own")
    flags.add_argument("--weights", help="of the backbone, as for a run (default: as the run had them)")
    flags.add_argument("--device", default="auto", help="auto, or a torch device (default: auto)")


def add_reading(flags: Parser) -> None:
    """What is done with files that are no pictures."""
    flags.add_argument("--skip-broken", action="store_true", help="leave out files that cannot be read, and list them")


def command(options: argparse.Namespace) -> int:
    """Print a line for every image."""
    from abm_vision.images.listing import pictures
    from abm_vision.images.photos import check_readable
    from abm_vision.images.predict import predict
    from abm_vision.runs.device import resolve_device

    device, paths = resolve_device(options.device), pictures([Path(place) for place in options.images])
    bad = check_readable(paths, options.skip_broken)
    report_skipped(bad)
    images = [path for path in paths if path not in bad]
    rows = predict(options.adapter, images, weights=options.weights, device=device, top=options.top)
    if options.json:
        print(json.dumps(rows))
    elif options.csv:
        table = csv.writer(sys.stdout, lineterminator="\n")
        table.writerow(["image", "rank", "class", "probability"])
        table.writerows(
            [row["image"], rank, one["class"], f"{one['probability']:.6f}"]
            for row in rows
            for rank, one in enumerate(row["top"], 1)
        )
    else:
        for row in rows:
            say(f"{row['image']}: {_in_words(row)}")
    return 0


def report_skipped(bad: dict[Path, str]) -> None:
    """Name the files that were left out, where messages go."""
    for reason in bad.values():
        print(f"left out: {reason}", file=sys.stderr)


def _in_words(row: dict[str, Any]) -> str:
    return ", ".join(f"{one['class']} {one['probability']:.3f}" for one in row["top"])
