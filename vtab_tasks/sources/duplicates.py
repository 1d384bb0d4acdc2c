"""Find image files with the same content, by size and ends first, so that few files are read whole."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

HEAD, TAIL = 4096, 1024  # bytes read of every file; this is the whole of a smaller file


class Glance(NamedTuple):
    """A file's size in bytes, its first bytes and its last ones."""

    size: int
    head: bytes
    tail: bytes


def glance(path: str | os.PathLike[str]) -> Glance:
    """Read a file's size and ends.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        head, size = file.read(HEAD), file.seek(0, os.SEEK_END)
        if size <= len(head):
            return Glance(size, head, head[-TAIL:])
        file.seek(max(0, size - TAIL))
        return Glance(size, head, file.read())


def contents(files: Iterable[tuple[Path, Glance]]) -> list[bytes]:
    """Hash every file; hashes are equal if contents are.

    A file is read whole only if another has its size and ends.

    Raises:
        OSError: a file cannot be read.
    """
    places = list(files)
    likely = [_hash(str(seen.size).encode(), seen.head, seen.tail) for _, seen in places]
    counts = Counter(likely)
    return [
        _hash(path.read_bytes()) if counts[one] > 1 and seen.size > HEAD else one
        for one, (path, seen) in zip(likely, places, strict=True)
    ]


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def describe(own: Sequence[bytes], labels: Sequence[int], trained: set[bytes]) -> str:
    """Say in words how many images of a list have the content of others; empty if none has.

    Args:
        own: hashes of the list's images.
        labels: their labels.
        trained: hashes of the training images, if this list is for validation or test.
    """
    found: dict[bytes, list[int]] = {}
    for content, label in zip(own, labels, strict=True):
        found.setdefault(content, []).append(label)
    again = sum(len(of) for of in found.values() if len(of) > 1)
    differing = sum(len(of) for of in found.values() if len(set(of)) > 1)
    leaked = sum(content in trained for content in own)
    words = []
    if leaked:
        words.append(f"{_count(leaked, own)} the same content as a training image")
    if again:
        labelled = f", {differing} of them with another label" if differing else ""
        words.append(f"{_count(again, own)} the same content as another{labelled}")
    return "; ".join(words)


def _count(some: int, all_: Sequence[bytes]) -> str:
    return f"{some} of its {len(all_)} images {'has' if some == 1 else 'have'}"
