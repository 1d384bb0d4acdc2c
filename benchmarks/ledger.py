"""Shared by the resumable benchmarks: a file of finished runs, and the flags `--task` and `--threads`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from abm_vision.abm.files import write_atomically

RESULTS = Path(__file__).parent / "results"


class Ledger:
    """`results/NAME.jsonl`: one line of JSON per finished run; the file is whole after every run."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.jsonl"
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        self.records: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]

    def append(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        text = "".join(json.dumps(r) + "\n" for r in self.records)
        write_atomically(self.path, lambda beside: beside.write_text(text, encoding="utf-8"))


def parse(description: str, *switches: str) -> argparse.Namespace:
    """Read the command line and set torch's threads. `switches` are further flags without a value."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--task", default="dsprites_loc")
    made.add_argument("--threads", type=int, help="of torch; 1 lets two tasks run side by side")
    for switch in switches:
        made.add_argument(switch, action="store_true")
    options = made.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    return options
