"""A task's items as a PyTorch dataset. Importing this needs torch, which `vtab_tasks` itself does not."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from vtab_tasks.taskdata import TaskData


class TorchDataset(Dataset[tuple[Any, int]]):
    """(image, label) items for a DataLoader.

    Args:
        data: a split of a task.
        transform: called with a PIL image in RGB, as torchvision's and timm's transforms are. Without one, images are
            uint8 tensors (3, H, W), which differ in size in tasks without a native size.
    """

    def __init__(self, data: TaskData, transform: Callable[[Image.Image], Any] | None = None) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels, label = self.data[index]
        if self.transform is None:
            return torch.tensor(pixels).permute(2, 0, 1), label
        return self.transform(Image.fromarray(pixels)), label
