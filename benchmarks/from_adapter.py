"""Initialise from an existing adapter: of the same task at another rank, or of another task.

    python benchmarks/from_adapter.py --task dsprites_loc      # resumes after an interruption

Rendered data, DINOv2 ViT-S/14 at 70 px. References are whole runs of 12 epochs with peft's default, seed 0. A
rank-8 adapter is initialised from one in two ways: by boundary matching (`abm_tuned`), and, if the ranks agree, by a
plain copy of A and B, the obvious baseline. Then come 4 epochs and a test on 1,000 images. The
head is fresh in all trials. The cost of tuning the references is not counted, as they exist already. Every trial is one
line of `results/from_adapter-TASK.jsonl`.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from directions import adapted
from initializers import SCREEN, WHOLE
from ledger import Ledger, parse
from peft import PeftModel

import vtab_tasks
from abm_vision import initialize_lora
from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.loading import load_reference
from abm_vision.images.answers import answer
from abm_vision.images.data import Images, Stream
from abm_vision.images.train import Progress, make_optimiser, train
from abm_vision.runs.device import autocast
from abm_vision.runs.folder import ADAPTER
from abm_vision.runs.provenance import environment
from abm_vision.vtab import RunConfig, make_config, run

OTHER = {"dsprites_loc": "dsprites_ori", "dsprites_ori": "dsprites_loc"}
SEEDS = (0,)
# Name to (task that the reference was tuned on, its rank, how the adapter is initialised from it).
TRIALS = {
    "peft's default": None,
    "same task, rank 8, matched": ("same", 8, "abm_tuned"),
    "same task, rank 16, matched": ("same", 16, "abm_tuned"),
    "other task, rank 8, matched": ("other", 8, "abm_tuned"),
    "same task, rank 8, copied": ("same", 8, "copied"),
    "other task, rank 8, copied": ("other", 8, "copied"),
}


def reference(task: str, rank: int, out: str) -> Path:
    """Return the folder of an adapter tuned on the task; tune it if it does not exist."""
    result = run(make_config(task=task, init="kaiming", rank=rank, alpha=rank, **WHOLE | {"test_images": 1000}), out)
    return Path(result["folder"]) / ADAPTER


def initialise(model: PeftModel, images: Images, precision: str, how: str, folder: Path, config: RunConfig) -> None:
    load_reference(model, folder, "reference")
    if how == "copied":
        with torch.no_grad():
            for layer in adapted_layers(model, "default").values():
                for factor in (layer.lora_A, layer.lora_B):
                    factor["default"].weight.copy_(factor["reference"].weight)
    else:
        with autocast(images.pixels.device, precision):
            batches = images.batches(config.batch_size, config.seed, 0)
            initialize_lora(model, how, batches, reference="reference", show_progress_bar=False)
    model.delete_adapter("reference")


def trial(task: str, name: str, seed: int, out: str) -> dict[str, Any]:
    model, images, device, precision = adapted(task, {}, seed)
    config = make_config(task=task, seed=seed, **SCREEN)
    seconds = 0.0
    if TRIALS[name]:
        where, rank, how = TRIALS[name]
        folder = reference(task if where == "same" else OTHER[task], rank, out)
        began = time.perf_counter()
        initialise(model, images, precision, how, folder, config)
        seconds = time.perf_counter() - began
    progress = Progress()
    train(model, make_optimiser(model, config), images, config, precision, progress, lambda _: None)
    test = vtab_tasks.load(task, "test", source="rendered").subset(config.test_images, seed)
    chunks = Stream(test, images.preprocessing)
    found = answer(model, chunks, images.preprocessing, device, precision, quiet=True)
    steps = len(progress.losses) // config.epochs
    epochs = [statistics.mean(progress.losses[k * steps : (k + 1) * steps]) for k in range(config.epochs)]
    return {
        "trial": name,
        "seed": seed,
        "lr": config.lr,
        "area": round(statistics.mean(progress.losses), 4),
        "loss_per_epoch": [round(value, 4) for value in epochs],
        "top1": found.correct / len(found),
        "start_epochs": round(seconds / statistics.median(progress.seconds), 2),
        "precision": precision,
        "environment": environment(str(device)),
    }


def main() -> None:
    options = parse(__doc__)
    ledger = Ledger(f"from_adapter-{options.task}")
    done = {(r["trial"], r["seed"]) for r in ledger.records}
    with tempfile.TemporaryDirectory() as out:
        for seed, name in itertools.product(SEEDS, TRIALS):
            if (name, seed) not in done:
                record = trial(options.task, name, seed, out)
                ledger.append(record)
                print(f"{name}, seed {seed}: {record['area']:.3f}, top-1 {100 * record['top1']:.1f} %", flush=True)


if __name__ == "__main__":
    main()
