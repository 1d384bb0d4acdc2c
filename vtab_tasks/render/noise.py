"""Random texture that is a function of place: the same stone looks the same in every picture of a scene."""

import numpy as np

from vtab_tasks.render.scene import Array


def noise(u: Array, v: Array, seed: int) -> Array:
    """Compute smooth value noise in [0, 1) with one knot per unit of u and v."""
    column, row = np.floor(u).astype(np.int64), np.floor(v).astype(np.int64)
    a, b = u - column, v - row
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    top = _knot(column, row, seed) * (1 - a) + _knot(column + 1, row, seed) * a
    bottom = _knot(column, row + 1, seed) * (1 - a) + _knot(column + 1, row + 1, seed) * a
    return (top * (1 - b) + bottom * b).astype(np.float32)


def _knot(column, row, seed: int):
    """A hash of two integers and the seed, in [0, 1)."""
    mixed = (column * 374_761_393 + row * 668_265_263 + seed * 2_246_822_519) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 13)) * 1_274_126_177) & 0xFFFFFFFF
    return (mixed ^ (mixed >> 16)) / 2**32
