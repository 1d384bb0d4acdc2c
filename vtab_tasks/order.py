"""The order of items inside a TFDS split, which decides what VTAB's slices hold.

TFDS sorts a split by the md5 of (split name, key); see its `core/hashing.py` and `core/shuffle.py`. So the
order, and with it the official membership of every VTAB split, is known without the data.
"""

import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.render.cache import cache_folder

DSPRITES_ROWS = 737_280
# Of the order as little-endian int32. It tells a damaged cache file from a good one.
DSPRITES_ORDER_SHA256 = "8a22f07d9467bf1e3b053e27e5e6979ca85172c2f518b5650240d857f727dce6"


def tfds_order(salt: str, keys: Iterable[int | str]) -> NDArray[np.int64]:
    """The order in which TFDS stores the examples of one split.

    Args:
        salt: The split's name in TFDS.
        keys: The examples' keys, in the order in which the builder yields them.

    Returns:
        int64 (n,): which key comes first, second, ...
    """
    prefix = salt.encode()
    digests = b"".join(hashlib.md5(prefix + str(key).encode(), usedforsecurity=False).digest() for key in keys)
    high, low = np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2).T
    return np.lexsort((low, high))


@cache
def dsprites_order() -> NDArray[np.int32]:
    """Rows of the dSprites file in TFDS order, int32 (737280,), read-only; kept in a cache file."""
    order = _read_cache()
    if order is None:
        order = tfds_order("train", range(DSPRITES_ROWS)).astype("<i4")
        _write_cache(order)
    order.flags.writeable = False
    return order


def _cache_file() -> Path:
    return cache_folder() / "dsprites_order_v1.npy"


def _read_cache() -> NDArray[np.int32] | None:
    """The kept order, or None where there is none or it is damaged."""
    try:
        content = _cache_file().read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    # An .npy file ends in the array itself, so that a damaged file is found out before anything is parsed.
    payload = content[-4 * DSPRITES_ROWS :]
    if hashlib.sha256(payload).hexdigest() != DSPRITES_ORDER_SHA256:
        return None
    return np.frombuffer(payload, dtype="<i4")


def _write_cache(order: NDArray[np.int32]) -> None:
    """Keep the order for the next process; without a writable cache folder say so and go on."""
    try:
        target = _cache_file()
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, draft = tempfile.mkstemp(dir=target.parent, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                np.save(file, order, allow_pickle=False)
            os.replace(draft, target)
        except OSError:
            os.unlink(draft)
            raise
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the order of dSprites cannot be kept, every process computes it again (a second): {error}",
            stacklevel=2,
        )
