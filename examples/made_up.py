"""Images for the examples: noise with a label. Replace it by your dataset."""

from __future__ import annotations

import torch
from torchvision.datasets import FakeData
from torchvision.transforms import v2

CLASSES = 4


def images(count: int, size: int) -> FakeData:
    """Return a dataset of (float32 image (3, size, size), label)."""
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)])
    return FakeData(count, (3, size, size), CLASSES, transform)
