"""`--lr auto`: a short sweep of learning rates, chosen by top-1 on validation; the test part stays closed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from abm_vision.abm.arguments import count
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Say
from abm_vision.tune.config import SWEPT, TuneConfig
from abm_vision.tune.harness import run

EPOCHS = 4  # of each rate, fewer if the run has fewer


def choose_rate(config: TuneConfig, out: str | Path, say: Say) -> float:
    """The rate with the highest top-1 on validation in a short run; of equal ones the nearest to the default.

    The runs lie under `out` as all others do: they are resumed and reused.

    Args:
        config: the settings of the run that the rate is for.
        out: parent of the runs' folders.
        say: receives a line for every rate.

    Raises:
        ValueError, OSError: as a run does; but a rate at which training diverges is passed over.
    """
    found: dict[float, float] = {}
    epochs = min(EPOCHS, config.epochs)
    short = replace(config, epochs=epochs, evaluate="val")
    for rate in SWEPT:
        try:
            found[rate] = run(replace(short, lr=rate), out)["validation"]["top1"]
        except Diverged:
            say(f"lr auto   {rate:g}: diverged")
            continue
        say(f"lr auto   {rate:g}: validation top-1 {100 * found[rate]:.2f} % after {count(epochs, 'epoch')}")
    if not found:
        raise ValueError(f"training diverges at every rate that --lr auto tries: {', '.join(f'{r:g}' for r in SWEPT)}")
    chosen = best(found)
    say(f"lr auto   {chosen:g} is taken")
    return chosen


def best(found: Mapping[float, float]) -> float:
    """The rate with the highest score; of equal ones the nearest to the default, by ratio."""
    default = TuneConfig().lr
    return max(found, key=lambda rate: (found[rate], -abs(math.log(rate / default))))
