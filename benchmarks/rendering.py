"""Seconds to draw dSprites: the 1,000 training images, 5,000 test images, the full test split.

python benchmarks/rendering.py
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

import vtab_tasks
from abm_vision.abm.files import write_json
from abm_vision.provenance import environment

RESULT = Path(__file__).parent / "results" / "rendering.json"


def main() -> None:
    rows = []
    for split, count in (("train800val200", 1000), ("test", 5000), ("test", 73_728)):
        start = time.perf_counter()
        data = vtab_tasks.load("dsprites_ori", split, source="rendered").subset(count, 0)
        for chunk in np.array_split(np.arange(count), count // 250):
            data.images(chunk)
        rows.append(
            {"split": split, "images": count, "seconds": time.perf_counter() - start, "labels": len(data.labels)}
        )
        print(rows[-1], flush=True)
    content = {"command": "python benchmarks/rendering.py", "environment": environment("cpu"), "rows": rows}
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
