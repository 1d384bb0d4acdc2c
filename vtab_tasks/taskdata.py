"""TaskData: the items of one split, the same to the user whichever source they come from."""

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
    """The (image, label) items of one split of a task. Can be pickled; images are read when asked for.

    Attributes:
        task: The task.
        split: One of `SPLITS`.
        source: `tfds`, `folder` or `rendered`.
        location: The folder that the data was found in; None for rendered data.
        description: One line for people: where the images come from, and whether they are the real ones.
        items: What reads the split's images and labels.
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
        """Item `index`: uint8 image (H, W, 3) and label. A slice gives a TaskData."""
        if isinstance(index, slice):
            return replace(self, positions=self.positions[index])
        position = self.positions[[as_index(index)]]
        return self.items.images(position)[0], int(self.items.labels(position)[0])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """Labels of all items, int64 (N,). No image is decoded; `tfds` reads its records the first time."""
        return self.items.labels(self.positions)

    def images(self, indices: ArrayLike) -> Sequence[NDArray[np.uint8]]:
        """Several images at once, which is quicker than one by one where they are drawn.

        Args:
            indices: Integers, shape (n,).

        Returns:
            n images, uint8 (H, W, 3) each: one array (n, H, W, 3) or a list, as the source has them. In tasks
            without a native `image_size` they differ in size.

        Raises:
            IndexError: An index is out of range.
        """
        return self.items.images(self.positions[np.asarray(indices, dtype=np.int64)])

    def torch(self, transform: "Callable[[Image.Image], Any] | None" = None) -> "TorchDataset":
        """The items as a `torch.utils.data.Dataset`.

        Args:
            transform: Gets a PIL image in RGB. Without one, images are uint8 tensors (3, H, W).
        """
        from vtab_tasks.torch import TorchDataset

        return TorchDataset(self, transform)

    def subset(self, n: int, seed: int) -> "TaskData":
        """`n` of the items, drawn without replacement by `seed` and kept in order.

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
