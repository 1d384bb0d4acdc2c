"""Labels of the tasks, derived from the features of a TFDS example.

Bins are those of the official VTAB code, github.com/google-research/task_adaptation, `data/*.py`. A threshold itself
belongs to the bin below it.
"""

import bisect
from collections.abc import Mapping
from typing import Any

CLEVR_DEPTHS = (8.0, 8.5, 9.0, 9.5, 10.0)  # scene units
KITTI_METRES = (8.0, 20.0)
KITTI_VEHICLES = 3  # types 0, 1, 2: Car, Van, Truck
KITTI_NO_VEHICLE = 3


def given(example: Mapping[str, Any]) -> int:
    """Return the dataset's own label."""
    return int(example["label"])


def clevr_count(example: Mapping[str, Any]) -> int:
    """Count the objects; scenes have 3 to 10."""
    return len(example["objects"]["pixel_coords"]) - 3


def clevr_dist(example: Mapping[str, Any]) -> int:
    """Bin the depth of the object nearest to the camera, the third of its pixel coordinates, into 6 bins."""
    return bisect.bisect_left(CLEVR_DEPTHS, min(coords[2] for coords in example["objects"]["pixel_coords"]))


def kitti_dist(example: Mapping[str, Any]) -> int:
    """Bin the distance z of the nearest car, van or truck into 3 bins; 3 if there is none."""
    objects = example["objects"]
    depths = [z for (_, _, z), kind in zip(objects["location"], objects["type"], strict=True) if kind < KITTI_VEHICLES]
    return bisect.bisect_left(KITTI_METRES, min(depths)) if depths else KITTI_NO_VEHICLE


def dsprites_loc(example: Mapping[str, Any]) -> int:
    """Bin the 32 horizontal positions into 16 bins of two, numbered from the left."""
    return int(example["label_x_position"] // 2)


def dsprites_ori(example: Mapping[str, Any]) -> int:
    """Bin the 40 orientations into 16 bins of 2.5, which hold 3, 2, 3, 2, ... steps."""
    return int(example["label_orientation"] // 2.5)


def snorb_azim(example: Mapping[str, Any]) -> int:
    """Return the azimuth in steps of 20 degrees."""
    return int(example["label_azimuth"])


def snorb_elev(example: Mapping[str, Any]) -> int:
    """Return the elevation in steps of 5 degrees, from 30."""
    return int(example["label_elevation"])
