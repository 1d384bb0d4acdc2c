"""`abm-vtab predict`: classify image files."""

from __future__ import annotations

import argparse
import json

from abm_vision.runs.cli import Parser


def parser() -> Parser:
    """An adapter, and images."""
    flags = Parser("abm-vtab predict", description="Classify image files with a saved adapter.")
    flags.add_argument("--adapter", required=True, metavar="DIR", help="a run's folder, or the adapter's own")
    flags.add_argument("--weights", help="of the backbone, as for a run (default: as the run had them)")
    flags.add_argument("--device", default="auto", help="auto, or a torch device (default: auto)")
    flags.add_argument("--json", action="store_true", help="print JSON")
    flags.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    return flags


def command(options: argparse.Namespace) -> int:
    """Print a line for every image."""
    from abm_vision.runs.device import resolve_device
    from abm_vision.vtab.predict import predict

    device = resolve_device(options.device)
    rows = predict(options.adapter, options.images, weights=options.weights, device=device)
    if options.json:
        print(json.dumps(rows))
    else:
        for row in rows:
            data = f"{row['task']} [{row['trained_on']}]"
            print(f"{row['image']}: class {row['label']} of {data}, probability {row['probability']:.3f}")
    return 0
