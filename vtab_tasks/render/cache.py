"""A cache of drawn pictures on disk: one SQLite file per scene, which processes may share.

Every picture has a checksum of its place and content; a damaged one is drawn again.
"""

import hashlib
import io
import sqlite3
import warnings
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtab_tasks.files import cache_folder

PATIENCE = 60.0  # seconds to wait while another process writes
TOGETHER = 64  # pictures written in one transaction: a killed process loses no more


@cache
def code_hash(*modules: str) -> str:
    """Hash the source of modules in this package, so that pictures drawn by other code are not used."""
    digest = hashlib.sha256()
    for name in modules:
        digest.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return digest.hexdigest()[:12]


def drawn(
    name: str, split: str, positions: Sequence[int], draw: Callable[[int], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    """Read the pictures (n, H, W, 3) at positions of a split from the cache `name`; draw and store missing ones."""
    file = f"pictures-{name}.sqlite"
    try:
        with _open(file) as store:
            return np.stack(_all(store, split, positions, draw))
    except (OSError, RuntimeError, sqlite3.DatabaseError) as error:  # RuntimeError: no home
        advice = "; delete it if it is damaged" if isinstance(error, sqlite3.DatabaseError) else ""
        warnings.warn(
            f"pictures cannot be cached in {file}, they are drawn again every time: {error}{advice}", stacklevel=2
        )
        return np.stack([draw(position) for position in positions])


class _open:
    """The database, created if it does not exist, and closed afterwards."""

    def __init__(self, file: str) -> None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.store = sqlite3.connect(folder / file, timeout=PATIENCE)

    def __enter__(self) -> sqlite3.Connection:
        self.store.execute("PRAGMA journal_mode=WAL")
        self.store.execute(
            "CREATE TABLE IF NOT EXISTS pictures "
            "(split TEXT, position INTEGER, png BLOB, checksum INTEGER, PRIMARY KEY (split, position))"
        )
        return self.store

    def __exit__(self, *_: object) -> None:
        self.store.close()


def _all(
    store: sqlite3.Connection, split: str, positions: Sequence[int], draw: Callable[[int], NDArray[np.uint8]]
) -> list[NDArray[np.uint8]]:
    pictures, fresh = [], []
    for position in positions:
        place = (split, position)
        found = store.execute("SELECT png, checksum FROM pictures WHERE split = ? AND position = ?", place).fetchone()
        if found is None or not isinstance(found[0], bytes) or found[1] != _checksum(*place, found[0]):
            pictures.append(draw(position))
            png = _png(pictures[-1])
            fresh.append((*place, png, _checksum(*place, png)))
        else:
            with Image.open(io.BytesIO(found[0])) as image:
                pictures.append(np.asarray(image))
        if len(fresh) == TOGETHER:
            _keep(store, fresh)
            fresh = []
    _keep(store, fresh)
    return pictures


def _keep(store: sqlite3.Connection, fresh: Sequence[tuple[str, int, bytes, int]]) -> None:
    with store:
        store.executemany("INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?)", fresh)


def _checksum(split: str, position: int, png: bytes) -> int:
    return zlib.crc32(png, zlib.crc32(f"{split}/{position}".encode()))


def _png(picture: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG", compress_level=1)
    return stream.getvalue()
