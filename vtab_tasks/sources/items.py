"""The interface of every source."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Items(Protocol):
    """The items of one whole split, by position. Can be pickled."""

    def images(self, positions: NDArray[np.int64]) -> Sequence[NDArray[np.uint8]]:
        """Read the images at these positions, uint8 (H, W, 3) each."""
        ...

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Read the labels at these positions, int64 (n,), without decoding an image."""
        ...
