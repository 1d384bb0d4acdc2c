"""The community's image folders, first written by github.com/ZhangYuanhan-AI/NOAH.

A task's folder holds a list for each split, `<split>.txt`, with lines `images/<split>/<index>.jpg <label>`,
paths relative to the folder.

A path that a list names twice, or that is in a list for training and in one for testing, is an error. Images with the
same content are only counted in the description and reported by a warning, because official data hold some. (In
dSprites a square is the same after a quarter turn, with another label; CIFAR-100 has test images that are training
images too.) A link counts as the same content under another name.
"""

import json
import os
import posixpath
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vtab_tasks.sources.duplicates import Glance, contents, describe, glance
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import SPLITS, Task

ORIGIN = "origin.json"  # written beside the lists by `vtab_tasks.export`
# Training lists that a split must not overlap. train800val200 is train800 and val200, so it shares their images.
_TRAINED = {"val200": ("train800",), "test": ("train800val200", "train800", "val200")}
# Raised by Pillow for files that are no image, truncated, damaged, or that claim an absurd size.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, TypeError, RuntimeError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class FolderItems:
    """Images named by a list file: line i + 1 of `list_file` names `paths[i]`, relative to its folder."""

    list_file: Path
    paths: tuple[str, ...]
    all_labels: NDArray[np.int64]

    def images(self, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._image(position) for position in positions]

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.all_labels[positions]

    def _image(self, position: int) -> NDArray[np.uint8]:
        try:
            return read_image(self.list_file.parent / self.paths[position])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{_line(self.list_file, position)}: {error}: fetch this file again") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return the image if its pixels have 8 bits: of more bits, Pillow would turn all brighter ones white.

    Raises:
        ValueError: the pixels have more bits.
    """
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels are of Pillow's mode {image.mode}: write it with 8 bits")
    return image


def read_image(
    path: str | os.PathLike[str], prepare: Callable[[Image.Image], Image.Image] = _eight_bits
) -> NDArray[np.uint8]:
    """Read an image file of any format that Pillow reads, as RGB, uint8 (H, W, 3).

    Args:
        path: the file.
        prepare: what is done with the open image before it is converted to RGB; it may raise a ValueError.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no image or damaged, or `prepare` refuses it (its pixels have more than 8 bits).
    """
    try:
        with open(path, "rb") as file:
            with Image.open(file) as image:
                if image.format == "PNG":
                    image.verify()  # the checksum of every part, which decoding does not check
            file.seek(0)
            with Image.open(file) as image:
                return np.array(prepare(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except UnidentifiedImageError:  # its own message names the open file, not its place
        raise ValueError(f"{path} cannot be read as an image (it is none that Pillow knows)") from None
    except _BROKEN as error:
        raise ValueError(f"{path} cannot be read as an image ({error})") from error


def layouts(task: Task) -> list[str]:
    """List the places of the task's folder below data_dir."""
    return [prefix + name for prefix in ("", "vtab-1k/") for name in task.folders]


def find(task: Task, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Find the task's folder below `data_dir`, one with any of the four lists; None if there is none."""
    if data_dir is None:
        return None
    for layout in layouts(task):
        folder = Path(data_dir) / layout
        if any((folder / f"{split}.txt").is_file() for split in SPLITS):
            return folder
    return None


def load(task: Task, split: str, data_dir: str | os.PathLike[str] | None) -> TaskData:
    """Load a split from the task's folder, after checking length, labels, and that every image is there and whole.

    Raises:
        ValueError: no `data_dir`; or the list is not the one of this task and split.
        FileNotFoundError: the folder, the list, or an image that the list names is missing.
    """
    if data_dir is None:
        raise ValueError('source="folder" needs data_dir, the folder that holds vtab-1k or tasks')
    folder = find(task, data_dir)
    if folder is None or not (folder / f"{split}.txt").is_file():
        raise FileNotFoundError(_missing_layout(task, split, folder or Path(data_dir)))
    list_file = folder / f"{split}.txt"
    entries = list(_entries(task, list_file))
    if len(entries) not in task.sizes(split):
        sizes = " or ".join(map(str, task.sizes(split)))
        raise ValueError(
            f"{list_file} has {len(entries)} lines, but {task.name}/{split} has {sizes} images: fetch the whole list"
        )
    paths, labels = zip(*entries, strict=True)
    items = FolderItems(list_file=list_file, paths=paths, all_labels=np.array(labels, dtype=np.int64))
    images = [(folder / path, _seen(folder / path, _line(list_file, k))) for k, path in enumerate(paths)]
    source, description = _origin(folder)
    if doubled := _doubled(task, list_file, paths, labels, images):
        warnings.warn(f"{list_file}: {doubled}", stacklevel=2)
        description = f"{description}; {doubled}"
    return TaskData(task, split, source, str(folder), description, items, np.arange(len(entries)))


def _doubled(
    task: Task,
    list_file: Path,
    paths: tuple[str, ...],
    labels: tuple[int, ...],
    images: list[tuple[Path, Glance]],
) -> str:
    """Words on images with the same content, in this list and in the training lists.

    Raises:
        ValueError: a path is in both.
    """
    there: dict[Path, Glance] = {}
    others = (list_file.with_name(f"{name}.txt") for name in _TRAINED.get(list_file.stem, ()))
    for other in filter(Path.is_file, others):
        lines = {path: k for k, (path, _) in enumerate(_entries(task, other))}
        for k, path in enumerate(paths):
            if path in lines:
                raise ValueError(
                    f"{_line(list_file, k)}: {path} is in {other.name}:{lines[path] + 1} too, and no image may be both "
                    "trained on and tested on: fetch both lists again"
                )
        found = (list_file.parent / path for path in lines)
        there |= {image: glance(image) for image in found if image.is_file()}
    hashes = contents([*images, *there.items()])
    own, trained = hashes[: len(images)], set(hashes[len(images) :])
    return describe(own, labels, trained)


def _origin(folder: Path) -> tuple[str, str]:
    """Source and description. Rendered images are reported as rendered from a folder, too."""
    description = f"folder: images and lists in {folder}"
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        came_from = origin["source"]
        what = origin["description"] if came_from == "rendered" else description
    except FileNotFoundError:
        return "folder", description
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / ORIGIN} does not record where the images came from ({error}): export again"
        ) from error
    if came_from == "rendered":
        return "rendered", f"{what}; written to {folder}"
    return "folder", f"{what}, written as PNG from {came_from} {origin.get('location') or ''}".rstrip()


def _entries(task: Task, list_file: Path) -> Iterator[tuple[str, int]]:
    """The (path, label) of every line, each checked. A byte order mark and blank last lines are ignored."""
    try:
        text = list_file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{list_file} is not a text file in UTF-8 ({error}): fetch it again") from error
    lines: dict[str, tuple[int, int]] = {}
    for k, line in enumerate(text.rstrip().split("\n") if text.strip() else ()):
        where, words = _line(list_file, k), line.split()
        if not words:
            raise ValueError(f"{where}: the line is empty: a list has blank lines only at its end")
        if len(words) > 2:
            raise ValueError(
                f"{where}: {line!r} has {len(words)} words: needed are path and label, a path has no blanks"
            )
        if len(words) < 2:
            raise ValueError(f"{where}: {line!r} is not of the form 'images/<split>/<index>.jpg <label>'")
        path, label = _inside(words[0], where), _label(task, words[1], where)
        if path in lines:
            number, other = lines[path]
            differing = f", with label {other}" if other != label else ""
            raise ValueError(f"{where}: {path} is in line {number} too{differing}: leave one of the two")
        lines[path] = k + 1, label
        yield path, label


def _line(list_file: Path, k: int) -> str:
    return f"{list_file}:{k + 1}"


def _inside(path: str, where: str) -> str:
    """The normalised path, which must stay below the list's folder."""
    if ".." in path.split("/") or path.startswith("/") or PureWindowsPath(path).anchor:
        raise ValueError(f"{where}: {path} leaves the folder: write it relative to the list, without '..'")
    if "\\" in path:
        raise ValueError(f"{where}: {path} is written with backslashes: write it with / between folders")
    return posixpath.normpath(path)


def _seen(image: Path, where: str) -> Glance:
    """The ends of a file, which must be those of a JPEG or PNG; the rest is checked when it is decoded."""
    if not os.path.isfile(image):
        raise FileNotFoundError(f"{where}: there is no {image}: fetch the missing image")
    seen = glance(image)
    # Some writers append a few bytes after the end of an image.
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG\r\n\x1a\n": b"IEND"}
    if not any(seen.head.startswith(head) and end in seen.tail for head, end in ends.items()):
        raise ValueError(f"{where}: {image} is truncated, or no JPEG or PNG: fetch this file again")
    return seen


def _label(task: Task, text: str, where: str) -> int:
    """The label, which must be one of the task's classes."""
    if re.fullmatch("-?[0-9]{1,9}", text) is None:
        raise ValueError(f"{where}: the label {text!r} is not an integer")
    label = int(text)
    if not 0 <= label < task.num_classes:
        raise ValueError(
            f"{where}: the label {label} is out of range: {task.name} has classes 0 to {task.num_classes - 1}"
        )
    return label


def _missing_layout(task: Task, split: str, place: Path) -> str:
    """The expected layout as a tree."""
    return "\n".join(
        [
            f"{place} does not hold {task.name}/{split} in the community layout. Expected below data_dir:",
            f"{' or '.join(layouts(task))}/",
            f"  {split}.txt              lines 'images/{split}/000000.jpg <label>', {task.size(split)} of them",
            f"  images/{split}/000000.jpg ...",
        ]
    )
