"""Image data sets of Hugging Face `datasets`, written once as files with a CSV beside them (`images.listing`)."""

from __future__ import annotations

import csv
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abm_vision.abm.files import writing
from abm_vision.runs.content import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
TABLE = "table.csv"
SAVED = ("dataset_dict.json", "state.json")  # which `save_to_disk` writes


def is_hub(place: str) -> bool:
    """Whether a place is a data set by name (`hf:NAME` or `hf:NAME:CONFIGURATION`), or `save_to_disk` wrote it."""
    return place.startswith(PREFIX) or _is_saved(place)


def _is_saved(folder: str) -> bool:
    return any((Path(folder) / name).is_file() for name in SAVED)


def table_of(place: str) -> Path:
    """The CSV of a data set, whose pictures are written into the user's cache the first time.

    Raises:
        ValueError: `datasets` is not installed; there is no such data set; it has no column of images or of classes, no
            split for training with labels, or a split with labels for some pictures only.
        OSError: the hub cannot be reached, or nothing can be written.
    """
    splits = _splits(place)
    key = "-".join(f"{name}-{split._fingerprint}" for name, split in splits.items())
    folder = cache_folder() / "datasets" / key
    if not (folder / TABLE).is_file():
        beside = folder.with_name(f".{folder.name}.part")
        with writing(folder):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            with (beside / TABLE).open("w", encoding="utf-8", newline="") as file:
                rows = csv.writer(file)
                rows.writerow(["path", "label", "split"])
                rows.writerows(row for name, split in splits.items() for row in _written(place, name, split, beside))
            shutil.rmtree(folder, ignore_errors=True)
            beside.rename(folder)
    return folder / TABLE


def _splits(place: str) -> Mapping[str, Dataset]:
    """Its splits for training, validation and test, by name; others, and those without labels, are left out."""
    found = _loaded(place)
    used = {name: data for name, data in found.items() if name.lower() in PARTS and _is_labelled(place, name, data)}
    if not any(PARTS[name.lower()] == "train" for name in used):
        raise ValueError(
            f"{place} has no split named train with labels (its splits: {', '.join(found)}): save one under that name "
            "by save_to_disk, and give the folder"
        )
    if others := sorted(set(found) - set(used)):
        why = f"no labels, or none of {', '.join(PARTS)}"
        warnings.warn(f"{place}: left out {', '.join(others)} ({why}); used: {', '.join(used)}", stacklevel=2)
    return used


def _is_labelled(place: str, name: str, data: Dataset) -> bool:
    """Whether a split has labels: -1 and None stand for none, as in test splits that are kept secret."""
    import datasets

    if PARTS[name.lower()] != "train" and not any(isinstance(f, datasets.ClassLabel) for f in data.features.values()):
        return False
    _, column = _columns(place, data)
    absent = [k for k, label in enumerate(data[column]) if label is None or label < 0]
    if 0 < len(absent) < len(data):
        raise ValueError(
            f"{place}: {len(absent)} of {len(data)} pictures of {name} have no label (the first: number {absent[0]}): "
            "leave them out with filter, save the rest by save_to_disk, and give the folder"
        )
    return not absent


def _columns(place: str, data: Dataset) -> tuple[str, str]:
    """The names of its columns of images and of classes."""
    import datasets

    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{place} has the columns {', '.join(data.features)}; needed are one of images (found: "
            f"{', '.join(images) or 'none'}) and one with a class for each (found: {', '.join(labels) or 'none'})"
        )
    return images[0], labels[0]


def _loaded(place: str) -> Mapping[str, Dataset]:
    """All its splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{place} needs datasets: pip install datasets") from error
    name = place.removeprefix(PREFIX)
    if _is_saved(name):
        found = datasets.load_from_disk(name)
    else:
        name, _, configuration = name.partition(":")
        try:
            found = datasets.load_dataset(name, configuration or None)
        except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            raise ValueError(f"{place} cannot be loaded ({error}): give hf:NAME, or hf:NAME:CONFIGURATION") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _written(place: str, split: str, data: Dataset, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Write a split's pictures as they are encoded; yields a row of the table for each."""
    import datasets

    image, label = _columns(place, data)
    names = data.features[label].names
    encoded = data.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))
    for k, row in enumerate(encoded):
        content = _content(row[image])
        path = folder / f"{split}-{k:07d}{_suffix(content)}"
        path.write_bytes(content)
        yield path.name, names[row[label]], split


def _content(image: Mapping[str, Any] | None) -> bytes:
    """As it is encoded; nothing where there is none: a file that cannot be read, as others."""
    if image is None:
        return b""
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _suffix(content: bytes) -> str:
    """By the first bytes: it is for people alone, Pillow does not ask."""
    return next((s for head, s in ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg")) if content.startswith(head)), ".img")
