"""Seconds to draw the 1,000 training images of every rendered task, first without and then from the cache.

python benchmarks/rendering.py
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import vtab_tasks
from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "rendering.json"
# Tasks that share pictures are measured once; the last is dSprites, which is drawn anew every time.
TASKS = ("clevr_count", "dmlab", "kitti_dist", "snorb_azim", "dsprites_loc")


def seconds(task: str) -> float:
    start = time.perf_counter()
    data = vtab_tasks.load(task, "train800val200", source="rendered")
    data.images(range(len(data)))
    return time.perf_counter() - start


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as empty:
        os.environ["XDG_CACHE_HOME"] = empty
        for task in TASKS:
            rows.append({"task": task, "images": 1000, "drawn": seconds(task), "again": seconds(task)})
            print(rows[-1], flush=True)
    write_json(RESULT, {"command": "python benchmarks/rendering.py", "environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
