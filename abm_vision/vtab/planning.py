"""How long runs of VTAB-1K are likely to take."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import vtab_tasks
from abm_vision.runs.harness import Session
from abm_vision.runs.run import run
from abm_vision.vtab.config import EVALUATIONS, RunConfig
from abm_vision.vtab.harness import HARNESS


def estimate(like: RunConfig, out: str | Path) -> tuple[Callable[[RunConfig], float], str]:
    """A function to the seconds that a run is likely to take, and in words what it is founded on.

    The throughput is that of finished runs under `out` with the same model at the same size, or else of one epoch that
    is run now.
    """
    # Scored on the 200 images: the test split is not opened for this.
    short = replace(like, epochs=1, evaluate="val")
    if found := _throughput(out, short):
        origin = f"finished runs in {out}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(HARNESS, short, Session(folder))
            found, origin = _throughput(folder, short), f"one epoch of {short.task} just now"

    def seconds(config: RunConfig) -> float:
        train, test = map(vtab_tasks.get_task(config.task).size, EVALUATIONS[config.evaluate])
        test = min(test, config.test_images) if config.test_images else test
        return found["before"] + config.epochs * train / found["train"] + test / found["test"]

    return seconds, (
        f"at {found['train']:.0f} images/s in training and {found['test']:.0f} in testing ({origin}); drawing or "
        "decoding images for the first time is extra"
    )


def _throughput(out: str | Path, like: RunConfig) -> dict[str, float] | None:
    alike = ("model", "image_size", "batch_size", "targets", "precision", "device")
    # A plan and a report name what cannot be read; here others will do.
    finished = (HARNESS.kept.state(folder).result for folder in Path(out).glob("*/"))
    found = [r for r in finished if r and all(r["config"][k] == getattr(like, k) for k in alike)]
    if not found:
        return None
    stages = [r["seconds"] for r in found]
    return {
        "train": statistics.median(r["images_per_second"]["train"] for r in found),
        "test": statistics.median(r["images_per_second"]["test"] for r in found),
        "before": statistics.median(s["data"] + s["weights"] + s["lora"] + s["init"] for s in stages),
    }
