"""TaskData: the items of one split, with one interface for every source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import index as as_index
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from vtab_tasks.sources.items import Items
from vtab_tasks.tasks import Task

if TYPE_CHECKING:
    from vtab_tasks.torch import TorchDataset


@dataclass(frozen=True, eq=False)
class TaskData(Sequence[tuple[NDArray[np.uint8], int]]):
    """The (image, label) items of one split of a task. Can be pickled; images are read on access.

    Attributes:
        task: the task.
        split: one of `SPLITS`.
        source: `tfds`, `folder` or `rendered`.
        location: folder of the data; None for rendered data.
        description: one line to read: where the images come from, and whether they are the official ones.
        items: reader of the split's images and labels.
        positions: int64 (N,), the items of the split that this object holds.
    """

    task: Task
    split: str
    source: str
    location: str | None
    description: str
    items: Items
    positions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskData": ...
    def __getitem__(self, index):
        """Return item `index`: uint8 image (H, W, 3) and label; of a slice, a TaskData."""
        if isinstance(index, slice):
            return replace(self, positions=self.positions[index])
        position = self.positions[[as_index(index)]]
        return self.items.images(position)[0], int(self.items.labels(position)[0])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels of all items, int64 (N,). No image is decoded; `tfds` reads its records the first time."""
        return self.items.labels(self.positions)

    def images(self, indices: ArrayLike) -> Sequence[NDArray[np.uint8]]:
        """Read several images at once, which is faster than one by one where they are rendered.

        Args:
            indices: integers, shape (n,).

        Returns:
            n images, uint8 (H, W, 3) each: one array (n, H, W, 3) or a list, depending on the source. Sizes differ in
            tasks without a native `image_size`.

        Raises:
            IndexError: an index is out of range.
        """
        return self.items.images(self.positions[np.asarray(indices, dtype=np.int64)])

    def torch(self, transform: "Callable[[Image.Image], Any] | None" = None) -> "TorchDataset":
        """Wrap the items as a `torch.utils.data.Dataset`.

        Args:
            transform: called with a PIL image in RGB. Without one, images are uint8 tensors (3, H, W).
        """
        from vtab_tasks.torch import TorchDataset

        return TorchDataset(self, transform)

    def subset(self, n: int, seed: int) -> "TaskData":
        """Draw `n` of the items without replacement, by `seed`, and keep their order.

        Raises:
            ValueError: `n` is smaller than 1 or larger than the number of items.
        """
        if not 1 <= n <= len(self):
            raise ValueError(
                f"cannot draw {n} items from {self.task.name}/{self.split}: it has {len(self)}, "
                f"give a number from 1 to {len(self)}"
            )
        if n == len(self):
            return self
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self))[:n])
        note = f"{self.description}; {n} of {len(self)} items, drawn with seed {seed}"
        return replace(self, positions=self.positions[drawn], description=note)
