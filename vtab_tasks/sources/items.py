"""What every source offers, and what they share in reading images."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Items(Protocol):
    """The items of one whole split, by position. Can be pickled."""

    def images(self, positions: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images at these positions, uint8 (n, H, W, 3)."""
        ...

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels at these positions, int64 (n,), without decoding an image."""
        ...


def stack_images(images: Iterable[NDArray[np.uint8]], count: int) -> NDArray[np.uint8]:
    """Gather `count` images (H, W, 3), at least one, as they come.

    Raises:
        ValueError: They differ in size.
    """
    images = iter(images)
    first = next(images)
    stacked = np.empty((count, *first.shape), dtype=np.uint8)
    stacked[0] = first
    for position, image in enumerate(images, start=1):
        if image.shape != first.shape:
            raise ValueError(
                f"images of {first.shape[:2]} and {image.shape[:2]} pixels cannot make one array: read them one by one"
            )
        stacked[position] = image
    return stacked
