"""Image data sets of Hugging Face `datasets`, written once as files with a CSV beside them (`images.listing`)."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abm_vision.abm.files import writing
from abm_vision.runs.content import cache_folder

if TYPE_CHECKING:
    from datasets import Dataset

PREFIX = "hf:"
TABLE = "table.csv"
SAVED = ("dataset_dict.json", "state.json")  # which `save_to_disk` writes


def is_hub(place: str) -> bool:
    """Whether a place is a data set by name (`hf:NAME`), or a folder that `save_to_disk` wrote."""
    return place.startswith(PREFIX) or any((Path(place) / name).is_file() for name in SAVED)


def table_of(place: str) -> Path:
    """The CSV of a data set, whose pictures are written into the user's cache the first time.

    Raises:
        ValueError: `datasets` is not installed; there is no such data set, or it has no column of images or of classes.
        OSError: the hub cannot be reached, or nothing can be written.
    """
    splits = _splits(place)
    folder = cache_folder() / "datasets" / "-".join(split._fingerprint for split in splits.values())
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
    """Its splits by name."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{place} needs datasets: pip install datasets") from error
    name = place.removeprefix(PREFIX)
    if not place.startswith(PREFIX):
        found = datasets.load_from_disk(name)
    else:
        try:
            found = datasets.load_dataset(name)
        except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
            raise ValueError(f"{place} cannot be loaded ({error}): give the name of a data set") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _written(place: str, split: str, data: Dataset, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Write a split's pictures as they are encoded; yields a row of the table for each."""
    import datasets

    images = [name for name, kind in data.features.items() if isinstance(kind, datasets.Image)]
    labels = [name for name, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{place} has the columns {', '.join(data.features)}; needed are one of images (found: "
            f"{', '.join(images) or 'none'}) and one of classes (found: {', '.join(labels) or 'none'})"
        )
    names = data.features[labels[0]].names
    encoded = data.select_columns([images[0], labels[0]]).cast_column(images[0], datasets.Image(decode=False))
    for k, row in enumerate(encoded):
        content = _content(row[images[0]])
        path = folder / f"{split}-{k:07d}{_suffix(content)}"
        path.write_bytes(content)
        yield path.name, names[row[labels[0]]], split


def _content(image: Mapping[str, Any]) -> bytes:
    return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()


def _suffix(content: bytes) -> str:
    """By the first bytes: it is for people alone, Pillow does not ask."""
    return next((s for head, s in ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpg")) if content.startswith(head)), ".img")
