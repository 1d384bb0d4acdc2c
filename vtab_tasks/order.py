"""The order of items inside a TFDS split, which decides what VTAB's slices hold.

TFDS sorts a split by the md5 of (split name, key); see its `core/hashing.py` and `core/shuffle.py`. So the
order, and with it the official membership of every VTAB split, is known without the data.
"""

import hashlib
import io
import warnings
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.files import cache_folder, write_whole

DSPRITES_ROWS = 737_280
# SHA-256 of the order as little-endian int32, by which a damaged cache file is found.
DSPRITES_ORDER_SHA256 = "8a22f07d9467bf1e3b053e27e5e6979ca85172c2f518b5650240d857f727dce6"


def tfds_order(salt: str, keys: Iterable[int | str]) -> NDArray[np.int64]:
    """Compute the order in which TFDS stores the examples of one split.

    Args:
        salt: the split's name in TFDS.
        keys: the examples' keys, in the order in which the builder yields them.

    Returns:
        int64 (n,): which key comes first, second, ...
    """
    prefix = salt.encode()
    digests = b"".join(hashlib.md5(prefix + str(key).encode(), usedforsecurity=False).digest() for key in keys)
    high, low = np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2).T
    return np.lexsort((low, high))


@cache
def dsprites_order() -> NDArray[np.int32]:
    """Return the rows of the dSprites file in TFDS order, int32 (737280,), read-only; cached in a file."""
    order = _read_cache()
    if order is None:
        order = tfds_order("train", range(DSPRITES_ROWS)).astype("<i4")
        _write_cache(order)
    order.flags.writeable = False
    return order


def _cache_file() -> Path:
    return cache_folder() / "dsprites_order_v1.npy"


def _read_cache() -> NDArray[np.int32] | None:
    """The cached order, or None if there is none or it is damaged."""
    try:
        content = _cache_file().read_bytes()
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    # An .npy file ends in the array itself, so that damage is found before anything is parsed.
    payload = content[-4 * DSPRITES_ROWS :]
    if hashlib.sha256(payload).hexdigest() != DSPRITES_ORDER_SHA256:
        return None
    return np.frombuffer(payload, dtype="<i4")


def _write_cache(order: NDArray[np.int32]) -> None:
    """Cache the order for the next process; a cache folder that cannot be written is a warning."""
    try:
        _cache_file().parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.save(content, order, allow_pickle=False)
        write_whole(_cache_file(), content.getvalue())
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the order of dSprites cannot be cached, every process computes it again (a second): {error}",
            stacklevel=2,
        )
