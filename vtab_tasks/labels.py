"""How the structured tasks derive their labels from the features of a TFDS example.

Bins are those of the official VTAB code, github.com/google-research/task_adaptation, `data/dsprites.py`.
"""

from collections.abc import Mapping
from typing import Any


def dsprites_loc(example: Mapping[str, Any]) -> int:
    """Horizontal position: the 32 positions in 16 bins of two, numbered from the left."""
    return int(example["label_x_position"] // 2)


def dsprites_ori(example: Mapping[str, Any]) -> int:
    """Orientation: the 40 steps in 16 bins of 2.5, which hold 3, 2, 3, 2, ... steps."""
    return int(example["label_orientation"] // 2.5)
