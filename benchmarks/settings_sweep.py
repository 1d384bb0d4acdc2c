"""What the settings of our starts do: one changed at a time.

    python benchmarks/settings_sweep.py --task dsprites_loc      # goes on where it stopped

Rendered data, DINOv2 ViT-S/14 at 70 px, the quick preset with 4 epochs, seed 0. Boundary matching takes its signs from
the pretrained model, at the preset's learning rate: peft's default does best with it in the screening of
`initializers.py`, and matching changes nothing that would ask for another. The length of A's rows acts on training like
a learning rate, so the aligned start is tried at several. Every run is kept as one line of
`results/settings_sweep-TASK.jsonl`.
"""

from __future__ import annotations

import itertools
from typing import Any

from initializers import SCREEN, run_once
from ledger import Ledger, parse

from abm_vision.vtab import make_config

ALIGNED: tuple[dict[str, Any], ...] = tuple(
    {"init": "abm_aligned", "align_norm": norm, "lr": lr}
    for norm, lr in itertools.product((1.0, 2.0, 4.0), (5e-4, 1e-3, 2e-3))
)
MATCHED: tuple[dict[str, Any], ...] = (
    {"init": "kaiming"},
    {"init": "abm"},
    {"init": "abm", "abm_margin": 0.1},
    {"init": "abm", "abm_margin": 1.0},
    {"init": "abm", "abm_margin": 0.25, "abm_margin_unit": "relative"},
    {"init": "abm", "abm_margin": 1.0, "abm_margin_unit": "relative"},
    {"init": "abm", "abm_lr": 3e-4},
    {"init": "abm", "abm_lr": 1e-3},
    {"init": "abm", "abm_lr": 1e-2},
    {"init": "abm", "abm_layers": "6"},
    {"init": "abm", "abm_steps": 10},
    {"init": "abm", "abm_steps": 200},
    {"init": "abm", "abm_samples": 32},
    {"init": "abm", "abm_samples": 512},
    {"init": "abm", "abm_batch_size": 32, "abm_steps": 100},
    {"init": "abm", "abm_layer_weights": "uniform"},
    {"init": "abm", "abm_fit": "local"},
    {"init": "abm", "abm_fit": "local", "abm_margin": 0.1},
    # the published recipe
    {"init": "abm", "abm_layers": "6", "abm_lr": 3e-4, "abm_batch_size": 1, "abm_steps": 100},
)


def main() -> None:
    options = parse(__doc__)
    ledger = Ledger(f"settings_sweep-{options.task}")
    for variation in (*ALIGNED, *MATCHED):
        run_once(ledger, "sweep", make_config(**{"task": options.task, **SCREEN, **variation}))


if __name__ == "__main__":
    main()
