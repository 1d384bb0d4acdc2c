"""`export` and `merge`: a run's adapter as one file."""

from __future__ import annotations

import argparse

from abm_vision.runs.cli import Parser, say


def export_parser(program: str) -> Parser:
    """An adapter, and a file of a kind."""
    flags = _parser(f"{program} export", "Write a tuned model as one file, and compare what the file computes.")
    flags.add_argument("--to", choices=("onnx", "torch", "timm"), required=True, help="kind of file")
    text = "the file takes uint8 RGB pixels and normalises them (default: float32, normalised before)"
    flags.add_argument("--normalise", action="store_true", help=text)
    return flags


def merge_parser(program: str) -> Parser:
    """An adapter, and a checkpoint."""
    flags = _parser(f"{program} merge", "Merge an adapter into its model's weights: a plain checkpoint for timm.")
    flags.set_defaults(to="timm", normalise=False)
    return flags


def _parser(name: str, description: str) -> Parser:
    flags = Parser(name, description=description)
    flags.add_argument("adapter", metavar="ADAPTER", help="a run's folder, or the adapter's own")
    flags.add_argument("--out", required=True, metavar="FILE", help="ends in .onnx, .pt2 (torch), .safetensors (timm)")
    flags.add_argument("--weights", help="of the backbone, as for a run (default: as the run had them)")
    return flags


def command(options: argparse.Namespace) -> int:
    """Write the file, and print how far it is from torch."""
    from abm_vision.export.write import export

    try:
        found = export(options.adapter, options.to, options.out, normalise=options.normalise, weights=options.weights)
    except ModuleNotFoundError as error:  # of a package for ONNX
        raise ValueError(str(error)) from None
    say(str(found))
    return 0
