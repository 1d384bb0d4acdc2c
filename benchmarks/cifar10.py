"""Initialisations of LoRA on real weights and real photographs: DINOv2 ViT-S/14, 1,000 images of CIFAR-10.

    python benchmarks/cifar10.py --size cpu                 # resumes
    python benchmarks/cifar10.py --size gpu --jobs 12

Every initialisation with every budget of epochs, learning rate and seed, through `abm_vision.tune`: 800 images to train
on and 200 to choose the epoch and the rate by, other ones for every seed, and 5,000 of the test batch. `classes`: the
ten classes. `turns` (GPU): quarter turns of the same photographs, a task that pretraining does not give away. GPU, too:
location and orientation on rendered dSprites. Each budget has its own whole cosine and a warm-up of a twelfth.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence import LONG, Work, make, parse, plugin
from numpy.typing import NDArray
from photographs import CLASSES, cifar10, save

from abm_vision import tune, vtab

TRAIN, VALIDATION, TEST = 800, 200, 5000


@dataclass(frozen=True)
class Size:
    """What is run."""

    subjects: tuple[str, ...]
    image_size: int
    inits: tuple[str, ...]
    epochs: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int


SIZES = {
    "gpu": Size(
        ("classes", "turns", "dsprites_loc", "dsprites_ori"),
        112,
        ("kaiming", "gaussian", "orthogonal", "eva", "pissa", "lora_ga", "abm", "abm_aligned", LONG),
        (1, 2, 4, 8),
        (5e-4, 1e-3, 2e-3, 4e-3),
        3,
    ),
    "cpu": Size(("classes",), 70, ("kaiming", LONG, "orthogonal", "abm", "abm_aligned"), (2, 8), (1e-3, 2e-3), 2),
}


def write(folder: Path, subject: str, seed: int) -> Path:
    """Write the photographs of a seed into train/, val/ and test/, by class; nothing if they are there."""
    if folder.is_dir():
        return folder
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    rng = np.random.default_rng(seed)
    (pixels, labels), test = cifar10("train"), cifar10("test")
    chosen = rng.permutation(len(pixels))[: TRAIN + VALIDATION]
    tested = np.random.default_rng(0).permutation(len(test[0]))[:TEST]  # the same for every seed
    parts = {
        "train": (pixels[chosen[:TRAIN]], labels[chosen[:TRAIN]]),
        "val": (pixels[chosen[TRAIN:]], labels[chosen[TRAIN:]]),
        "test": tuple(values[tested] for values in test),
    }
    for part, (images, answers) in parts.items():
        names = CLASSES
        if subject == "turns":
            images, answers, names = *turned(images, rng), ["0", "90", "180", "270"]
        for label, name in enumerate(names):
            save(beside / part / name, images[answers == label])
    beside.rename(folder)
    return folder


def turned(images: NDArray[np.uint8], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Turn every image (n, 32, 32, 3) by a number of quarters, which is its label (n,)."""
    quarters = rng.integers(4, size=len(images))
    return np.stack([np.rot90(image, k) for image, k in zip(images, quarters, strict=True)]), quarters


def work(size: Size, out: Path) -> Iterator[Work]:
    """Seeds outermost, as the work may be cut short."""
    for seed, subject in itertools.product(range(size.seeds), size.subjects):
        for init, epochs, lr in itertools.product(size.inits, size.epochs, size.rates):
            shared = {**plugin(init), "seed": seed, "epochs": epochs, "lr": lr, "warmup": 1 / 12}
            if subject in ("classes", "turns"):
                folder = write(out / "data" / f"{subject}-{seed}", subject, seed)
                config = tune.make_config(data=str(folder), image_size=size.image_size, **shared)
                yield Work(subject, tune.HARNESS, config)
            else:
                config = vtab.make_config(task=subject, source="rendered", test_images=TEST, **shared)
                yield Work(subject, vtab.HARNESS, config)


if __name__ == "__main__":
    options = parse(__doc__)
    (options.out / "data").mkdir(parents=True, exist_ok=True)
    make("cifar10", list(work(SIZES[options.size], options.out)), options)
