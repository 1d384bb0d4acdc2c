"""Whether a third of the epochs is enough: top-1 after 4 epochs on every rendered task, beside the default 12.

    python benchmarks/schedule.py        # resumes if interrupted

The runs of 12 epochs, with one of warm-up, are those of `results/suite`; both have the same seeds and 5,000 test
images. Every run is one line of `results/schedule.jsonl`, and is not repeated.
"""

from __future__ import annotations

from initializers import run_once
from ledger import Ledger

from abm_vision.vtab import make_config

TASKS = "clevr_count clevr_dist dmlab dsprites_loc dsprites_ori kitti_dist snorb_azim snorb_elev".split()
SEEDS = (0, 1)
INIT, EPOCHS = "abm", 4

if __name__ == "__main__":
    ledger = Ledger("schedule")
    for seed in SEEDS:
        for task in TASKS:
            run_once(ledger, "quick", make_config(task=task, seed=seed, init=INIT, source="rendered", epochs=EPOCHS))
