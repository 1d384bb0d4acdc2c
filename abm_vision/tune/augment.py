"""Training images changed at random by timm's transforms: a function of seed, epoch and image, whoever decodes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from abm_vision.images.data import Images, Preprocessing
from abm_vision.images.photos import PhotoSplit
from abm_vision.runs.order import shuffled

# What timm's `create_transform` is given beside size and statistics.
RECIPES = {
    "light": {"scale": (0.6, 1.0), "color_jitter": 0.0},
    "timm": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},  # of timm's own scripts
}


class Augmented(Images):
    """Images that are decoded and changed anew for every epoch; those for the initialisation are as they are.

    Args:
        data: the training images.
        preprocessing: what the model expects.
        device: of the batches.
        recipe: one of `RECIPES`.
        workers: processes that decode; they change no result.
    """

    def __init__(
        self, data: PhotoSplit, preprocessing: Preprocessing, device: torch.device, recipe: str, workers: int
    ) -> None:
        self.data, self.preprocessing, self.device, self.workers = data, preprocessing, device, workers
        size = preprocessing.image_size
        statistics = {name: getattr(preprocessing, name) for name in ("interpolation", "mean", "std")}
        self.transform = create_transform(size, is_training=True, **statistics, **RECIPES[recipe])

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(float images (b, 3, size, size), labels (b,)) of one epoch; the last batch may be smaller."""
        order = [batch.tolist() for batch in shuffled(len(self), batch_size, seed, epoch)]
        changed = _Changed(self.data, self.transform, seed, epoch)
        generator = torch.Generator()  # else the loader draws from the one that dropout draws from
        for batch in DataLoader(changed, batch_sampler=order, num_workers=self.workers, generator=generator):
            pixels, labels = batch
            yield pixels.to(self.device), labels.to(self.device)

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float images (b, 3, size, size), labels (b,)) of the given positions, unchanged."""
        pixels = self.preprocessing.resize(self.data.images(indices.cpu().numpy())).to(self.device)
        labels = torch.from_numpy(self.data.labels)[indices.cpu()]
        return self.preprocessing.normalise(pixels), labels.to(self.device)


class _Changed(Dataset):
    """Item k is the k-th image of an epoch, changed, with its label."""

    def __init__(self, data: PhotoSplit, transform: Callable[[Image.Image], Tensor], seed: int, epoch: int) -> None:
        self.data, self.transform, self.seed, self.epoch = data, transform, seed, epoch

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, k: int) -> tuple[Tensor, int]:
        (image,) = self.data.images([k])
        with _drawing_from((self.seed, self.epoch, k)):
            return self.transform(Image.fromarray(image)), int(self.data.labels[k])


@contextmanager
def _drawing_from(entropy: tuple[int, ...]) -> Iterator[None]:
    """Seed all generators that transforms draw from, and give their states back."""
    drawn = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(drawn)
        np.random.seed(drawn)
        torch.default_generator.manual_seed(drawn)  # of the CPU alone
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
