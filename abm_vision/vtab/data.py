"""From a task's images to batches on the device: uint8 until the last moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm.data
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from abm_vision.runs.order import shuffled
from vtab_tasks import TaskData

CHUNK = 256  # images that are drawn or decoded, and resized, together


@dataclass(frozen=True)
class Preprocessing:
    """What the pretrained model expects: square images without cropping, normalised by its own statistics.

    Args:
        image_size: pixels.
        interpolation: a torchvision name, antialiased.
        mean, std: per channel, of pixels in [0, 1].
    """

    image_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def resize(self, images: Sequence[np.ndarray]) -> Tensor:
        """n images, uint8 (height, width, 3), to uint8 (n, 3, size, size); the aspect ratio is not kept, as in VTAB."""
        groups = [np.stack(images)] if len({i.shape for i in images}) == 1 else [np.array(i[None]) for i in images]
        size, interpolation = [self.image_size] * 2, InterpolationMode(self.interpolation)
        pixels = (torch.from_numpy(group).permute(0, 3, 1, 2) for group in groups)
        return torch.cat([resize(group, size, interpolation, antialias=True) for group in pixels])

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, size, size) to float32, on the device of the pixels."""
        mean, std = (torch.tensor(v, device=pixels.device).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


def preprocessing_for(
    model: nn.Module, image_size: int, normalisation: str = "model", interpolation: str = "model"
) -> Preprocessing:
    """What timm records with the pretrained weights, or ImageNet's statistics, or pixels in [0, 1] as they are.

    Papers on VTAB-1K differ here with the same checkpoint.
    """
    recorded = timm.data.resolve_model_data_config(model)
    mean, std = {
        "model": (tuple(recorded["mean"]), tuple(recorded["std"])),
        "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    }[normalisation]
    if interpolation == "model":
        interpolation = recorded["interpolation"]
    return Preprocessing(image_size, interpolation, mean, std)


class _Chunks(Dataset):
    """Item k is the k-th chunk of resized images and labels."""

    def __init__(self, data: TaskData, preprocessing: Preprocessing) -> None:
        self.data = data
        self.preprocessing = preprocessing
        self.parts = np.array_split(np.arange(len(data)), -(-len(data) // CHUNK))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor] | Exception:
        indices = self.parts[k]
        try:
            labels = self.data.items.labels(self.data.positions[indices])  # of these alone: every process has its part
            return self.preprocessing.resize(self.data.images(indices)), torch.from_numpy(labels)
        except (ValueError, OSError) as error:  # torch would wrap one of another process into its traceback
            return error


class Stream:
    """Chunks of (uint8 images (n, 3, size, size), int64 labels (n,)) in order, never the whole set at once.

    Iterating raises a ValueError or an OSError where an image cannot be read.
    """

    def __init__(self, data: TaskData, preprocessing: Preprocessing, workers: int = 0) -> None:
        self.chunks = DataLoader(_Chunks(data, preprocessing), batch_size=None, num_workers=workers)

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def load_all(data: TaskData, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """The whole set in memory: uint8 (n, 3, size, size) and int64 (n,)."""
    chunks = list(Stream(data, preprocessing))
    return torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks])


class Images:
    """The training set on the device, as an iterable of calibration batches and a source of training batches."""

    def __init__(self, pixels: Tensor, labels: Tensor, preprocessing: Preprocessing, device: torch.device) -> None:
        self.pixels, self.labels = pixels.to(device), labels.to(device)
        self.preprocessing = preprocessing

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(float images (b, 3, size, size), labels (b,)) of one epoch; the last batch may be smaller."""
        for indices in shuffled(len(self), batch_size, seed, epoch):
            yield self.select(indices)

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float images (b, 3, size, size), labels (b,)) of the given positions."""
        indices = indices.to(self.pixels.device)
        return self.preprocessing.normalise(self.pixels[indices]), self.labels[indices]


def data_record(data: TaskData) -> dict[str, Any]:
    """What a result says of its data."""
    return {
        "task": data.task.name,
        "split": data.split,
        "source": data.source,
        "description": data.description,
        "images": len(data),
    }
