"""Share of the data path in the time of a training epoch and of the test, in the quick preset.

    python benchmarks/data_path.py

DINOv2 ViT-S/14 at 70 px. Training: the 1,000 images are in memory as resized bytes; its data path selects and
normalises batches. Test: 1,000 images are drawn or read from the cache, resized and normalised while they are
counted; they are in the cache already. Both are timed alone and within the real loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from directions import adapted

import vtab_tasks
from abm_vision.abm.files import write_json
from abm_vision.images.answers import answer
from abm_vision.images.data import Stream
from abm_vision.images.train import Progress, make_optimiser, train
from abm_vision.runs.provenance import environment
from abm_vision.vtab import make_config

RESULT = Path(__file__).parent / "results" / "data_path.json"
TASKS = ("dsprites_loc", "clevr_count")  # drawn every time; from the cache


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(task: str) -> dict[str, object]:
    model, images, device, precision = adapted(task, {})
    config = make_config(task=task, epochs=1, test_images=1000)
    test = vtab_tasks.load(task, "test", source="rendered").subset(1000, 0)
    test.images(range(1000))  # the cache is filled

    def test_data() -> None:
        for pixels, _ in Stream(test, images.preprocessing):
            images.preprocessing.normalise(pixels.to(device))

    def epoch() -> None:
        train(model, make_optimiser(model, config), images, config, precision, Progress(), lambda _: None)

    epoch()  # warm
    whole = {
        "train": seconds(epoch),
        "test": seconds(
            lambda: answer(model, Stream(test, images.preprocessing), images.preprocessing, device, precision, True)
        ),
    }
    data = {"train": seconds(lambda: list(images.batches(config.batch_size, 0, 0))), "test": seconds(test_data)}
    return {"task": task, "precision": precision, "data": data, "whole": whole}


def main() -> None:
    rows = []
    for task in TASKS:
        rows.append(measure(task))
        print(rows[-1], flush=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    content = {"command": "python benchmarks/data_path.py", "environment": environment(device), "rows": rows}
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
