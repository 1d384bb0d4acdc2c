"""What the evidence on real weights and data shares: runs of the real harnesses, each made once, and what is kept.

Runs lie in `--out`, where an interrupted one is resumed; a finished one is a line of `results/NAME-SIZE.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ledger import Ledger

from abm_vision.runs.executors import in_this_process, local
from abm_vision.runs.harness import Harness, Session
from abm_vision.runs.settings import AdapterSettings

LONG = "kaiming_long"
SIZES = ("gpu", "cpu")
KEPT = (
    "scores test validation perplexity top1_per_epoch loss_per_step seconds seconds_per_epoch information_loss".split()
)
ABOUT = "precision environment weights".split()


@dataclass(frozen=True)
class Work:
    """One run: a name for what it is about, its harness and its settings; `diagnose` adds its information loss."""

    subject: str
    harness: Harness
    config: AdapterSettings
    diagnose: bool = False

    @property
    def key(self) -> list[Any]:
        """What tells it from the others, wherever the data lie."""
        config = self.config
        return [self.subject, config.init, config.epochs, config.lr, config.seed]


def plugin(init: str) -> dict[str, str]:
    """The settings that name an initialisation, and where it is from."""
    return {"init": init} | ({"plugin": "long_rows"} if init == LONG else {})


def parse(description: str) -> argparse.Namespace:
    """Read `--size`, `--jobs` and `--out`."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=SIZES, default="cpu")
    made.add_argument("--jobs", type=int, default=1, help="processes side by side")
    made.add_argument("--out", type=Path, default=Path("results/evidence"), help="for runs and data")
    made.add_argument("--list", action="store_true", help="say how many runs are done, and end")
    return made.parse_args()


def make(name: str, work: Sequence[Work], options: argparse.Namespace) -> None:
    """Make every run that the ledger lacks, in this order, and keep what the tables need of it."""
    ledger = Ledger(f"{name}-{options.size}")
    done = [record["key"] for record in ledger.records]
    left = [one for one in work if one.key not in done]
    print(f"{name}: {len(work) - len(left)} of {len(work)} runs done", flush=True)
    if options.list:
        return
    execute = local(options.jobs) if options.jobs > 1 else in_this_process
    while left:  # a stretch of runs of one kind at a time
        kind = left[0].harness, left[0].diagnose
        count = next((k for k, one in enumerate(left) if (one.harness, one.diagnose) != kind), len(left))
        part = {one.config: one for one in left[:count]}
        left = left[count:]
        session = Session(options.out / "runs", diagnose=kind[1])
        for config, outcome in execute(kind[0], list(part), session):
            one = part[config]
            if outcome.state == "failed" and not outcome.diverged:
                raise RuntimeError(f"{one.key}: {outcome.reason}")
            folder = session.out / config.run_name()
            found = kind[0].kept.read(folder) if outcome.state == "done" else {}
            ledger.append({"key": one.key, "diverged": outcome.diverged, **slim(found), **accuracy(folder)})
            print(json.dumps(ledger.records[-1] | {"loss_per_step": None, "environment": None}), flush=True)


def accuracy(folder: Path) -> dict[str, float]:
    """The share of a text run's greedy answers that are the expected ones, before and after training."""
    path = folder / "samples.jsonl"
    samples = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    if not samples:
        return {}

    def share(name: str) -> float:
        return sum(s[name].strip().rstrip(".").lower() == s["expected"] for s in samples) / len(samples)

    return {"accuracy": share("answer"), "accuracy_before": share("before")}


def slim(result: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the tables need."""
    kept = {name: result[name] for name in KEPT if name in result}
    if "loss_per_step" in kept:
        kept["loss_per_step"] = [round(value, 4) for value in kept["loss_per_step"]]
    if lost := kept.get("information_loss"):
        kept["information_loss"] = {moment: report["overall"]["loss"] for moment, report in lost.items()}
    return kept | {name: result[name] for name in ABOUT if name in result}
