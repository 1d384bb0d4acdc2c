"""From images to batches on the device: uint8 until the last moment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import timm.data
import torch
from numpy.typing import ArrayLike, NDArray
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from abm_vision.runs.order import shuffled
from vtab_tasks.sources.items import Items

CHUNK = 256  # images that are drawn or decoded, and resized, together


@dataclass(frozen=True)
class Preprocessing:
    """What the pretrained model expects: square images, normalised by its own statistics.

    Args:
        image_size: pixels.
        interpolation: a torchvision name, antialiased.
        mean, std: per channel, of pixels in [0, 1].
        crop_mode: "squash" does not keep the aspect ratio, as in VTAB; "center" cuts a square out of the middle.
        crop_pct: the square's side, as a share of the shorter side.
    """

    image_size: int
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    crop_mode: str = "squash"

    def resize(self, images: Sequence[np.ndarray]) -> Tensor:
        """n images, uint8 (height, width, 3), to uint8 (n, 3, size, size)."""
        groups = [np.stack(images)] if len({i.shape for i in images}) == 1 else [np.array(i[None]) for i in images]
        pixels = (torch.from_numpy(group).permute(0, 3, 1, 2) for group in groups)
        return torch.cat([self._square(group) for group in pixels])

    def _square(self, pixels: Tensor) -> Tensor:
        side, interpolation = self.image_size, InterpolationMode(self.interpolation)
        if self.crop_mode == "squash":
            return resize(pixels, [side, side], interpolation, antialias=True)
        shorter = int(side / self.crop_pct)  # as timm rounds it
        return center_crop(resize(pixels, [shorter], interpolation, antialias=True), [side, side])

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 (n, 3, size, size) to float32, on the device of the pixels."""
        mean, std = (_per_channel(tuple(values), pixels.device) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept on the device: a copy from the host would be waited for at every batch."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


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


class Split(Protocol):
    """Labelled images: a `vtab_tasks.TaskData`, or another of the same form. Can be pickled.

    Attributes:
        items: reads images and labels by position.
        positions: int64 (n,), those of the split.
        at_once: how many are held in memory before they are resized; `CHUNK` if it has no such attribute.
    """

    items: Items
    positions: NDArray[np.int64]

    def __len__(self) -> int: ...

    def images(self, indices: ArrayLike) -> Sequence[NDArray[np.uint8]]:
        """Read the images (height, width, 3) at these indices into `positions`."""
        ...


class _Chunks(Dataset):
    """Item k is the k-th chunk of resized images and labels."""

    def __init__(self, data: Split, preprocessing: Preprocessing) -> None:
        self.data = data
        self.preprocessing = preprocessing
        self.parts = np.array_split(np.arange(len(data)), -(-len(data) // CHUNK))
        self.at_once = getattr(data, "at_once", CHUNK)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, k: int) -> tuple[Tensor, Tensor] | Exception:
        indices = self.parts[k]
        try:
            labels = self.data.items.labels(self.data.positions[indices])  # of these alone: every process has its part
            groups = np.split(indices, range(self.at_once, len(indices), self.at_once))
            pixels = torch.cat([self.preprocessing.resize(self.data.images(group)) for group in groups])
            return pixels, torch.from_numpy(labels)
        except (ValueError, OSError) as error:  # torch would wrap one of another process into its traceback
            return error


class Stream:
    """Chunks of (uint8 images (n, 3, size, size), int64 labels (n,)) in order, never the whole set at once.

    Iterating raises a ValueError or an OSError where an image cannot be read.
    """

    def __init__(self, data: Split, preprocessing: Preprocessing, workers: int = 0) -> None:
        self.chunks = DataLoader(_Chunks(data, preprocessing), batch_size=None, num_workers=workers)

    def __len__(self) -> int:
        return len(self.chunks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chunk in self.chunks:
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk


def load_all(data: Split, preprocessing: Preprocessing, workers: int = 0) -> tuple[Tensor, Tensor]:
    """The whole set in memory: uint8 (n, 3, size, size) and int64 (n,)."""
    chunks = list(Stream(data, preprocessing, workers))
    return torch.cat([c[0] for c in chunks]), torch.cat([c[1] for c in chunks])


class Images:
    """The training set in memory: an iterable of calibration batches, and a source of training batches, on the device.

    The images are kept on the device too, unless they take more than a quarter of a GPU's memory.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, preprocessing: Preprocessing, device: torch.device) -> None:
        place = device if _has_room(device, pixels.nbytes) else torch.device("cpu")
        self.pixels, self.labels = pixels.to(place), labels.to(place)
        self.preprocessing, self.device = preprocessing, device

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(float images (b, 3, size, size), labels (b,)) of one epoch; the last batch may be smaller."""
        order = torch.cat(shuffled(len(self), batch_size, seed, epoch)).to(self.labels.device)  # at once: a copy waits
        for indices in order.split(batch_size):
            yield self.select(indices)

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float images (b, 3, size, size), labels (b,)) of the given positions."""
        indices = indices.to(self.labels.device)
        pixels, labels = self.pixels[indices].to(self.device), self.labels[indices].to(self.device)
        return self.preprocessing.normalise(pixels), labels


def _has_room(device: torch.device, size: int) -> bool:
    return device.type != "cuda" or size <= torch.cuda.get_device_properties(device).total_memory / 4
