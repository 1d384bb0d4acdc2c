"""Pictures as people have them: upright, over white, from 16 bits to 8; what is no single picture is an error."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageOps

from abm_vision.abm.arguments import count
from abm_vision.runs.content import remembered
from vtab_tasks.sources.folder import read_image

SHOWN = 20  # broken files that a message names


def read_photo(path: str | os.PathLike[str]) -> NDArray[np.uint8]:
    """Read a picture as a viewer shows it, as RGB, uint8 (H, W, 3).

    It is turned as its EXIF says, transparency is laid over white, 16-bit grey becomes 8 bits, CMYK becomes RGB.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, is damaged, or holds several (an animation).
    """
    return read_image(path, _as_shown)


def _as_shown(image: Image.Image) -> Image.Image:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a camera's JPEG with a smaller copy or a second lens's view behind it
        raise ValueError(f"it has {frames} frames: save one of them as a picture of its own")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}: write it with 8 or 16 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


@dataclass(frozen=True, eq=False)
class Photos:
    """Labelled picture files, as `vtab_tasks.sources.items.Items`. Labels are positions in a list of classes."""

    paths: tuple[Path, ...]
    all_labels: NDArray[np.int64]

    def images(self, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Read the pictures at these positions, uint8 (H, W, 3) each."""
        return [read_photo(self.paths[position]) for position in positions]

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Labels at these positions, int64 (n,)."""
        return self.all_labels[positions]


@dataclass(frozen=True, eq=False)
class PhotoSplit:
    """Some of the photos, as an `abm_vision.images.data.Split`."""

    items: Photos
    positions: NDArray[np.int64]
    at_once: ClassVar[int] = 4  # a photograph is tens of MB until it is resized

    def __len__(self) -> int:
        return len(self.positions)

    def images(self, indices: ArrayLike) -> Sequence[NDArray[np.uint8]]:
        """Read the pictures at these indices into `positions`."""
        return self.items.images(self.positions[np.asarray(indices, dtype=np.int64)])

    @property
    def labels(self) -> NDArray[np.int64]:
        """Labels, int64 (n,)."""
        return self.items.labels(self.positions)

    @property
    def paths(self) -> list[Path]:
        """The files."""
        return [self.items.paths[position] for position in self.positions]


def check_readable(paths: Sequence[Path], skip_broken: bool) -> dict[Path, str]:
    """The files that cannot be read as pictures, with the reason.

    Every file is decoded, on all cores; what came of it is cached while the files are unchanged.

    Raises:
        ValueError: there are such files, or some are missing, and they are not to be skipped; the message names them.
    """
    there = [path for path in paths if path.is_file()]

    def read() -> str:
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            return json.dumps({k: reason for k, reason in enumerate(pool.map(_fault, there)) if reason})

    found = json.loads(remembered(there, "photos 2", read)) if there else {}
    unread = {there[int(k)]: f"{there[int(k)]} {reason}" for k, reason in found.items()}
    bad = {path: f"no image {path}" for path in paths if not path.is_file()} | unread
    if bad and not skip_broken:
        named = "".join(f"\n  {reason}" for reason in list(bad.values())[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(
            f"{len(bad)} of {count(len(paths), 'file')} cannot be read; mend or remove "
            f"{'it' if len(bad) == 1 else 'them'}, or --skip-broken:{named}{more}"
        )
    return bad


def _fault(path: Path) -> str | None:
    """Why a file cannot be read, without its name: what is cached is read again from another folder."""
    try:
        read_photo(path)
    except (ValueError, OSError) as error:
        return str(error).removeprefix(f"{path} ")
    return None
