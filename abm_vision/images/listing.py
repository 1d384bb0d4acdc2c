"""Which files are pictures of which class: folders of classes, with or without parts for training and test, or a CSV.

No file is opened here but a CSV. What is neither a picture nor a folder by its name is counted, not read.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from abm_vision.abm.arguments import count
from abm_vision.images.hub import PARTS, is_hub, table_of
from abm_vision.runs.folder import CONFIG

COLUMNS = ("path", "label")
LAYOUTS = "FOLDER/CLASS/*, FOLDER/train|val|test/CLASS/*, a CSV file with columns path and label, or hf:NAME"


@dataclass(frozen=True)
class Photo:
    """A picture file, its class, and its part: train, validation or test, None where that is to be drawn."""

    path: Path
    label: str
    part: str | None


@dataclass
class Listing:
    """What is found at a place: its kind (`folder`, `csv` or `datasets`), pictures in order, other files by suffix."""

    source: str
    photos: list[Photo]
    others: Counter[str] = field(default_factory=Counter)


def find(given: str | Path) -> Listing:
    """List the pictures at a place: a folder, a CSV file, or a data set (see `images.hub`).

    Raises:
        FileNotFoundError: there is no such place, or the CSV names a file that is not there.
        ValueError: it holds no pictures by class; or the CSV has other columns, or a row without a label.
    """
    place = Path(given)
    if is_hub(str(given)):
        return Listing("datasets", list(_from_csv(table_of(str(given)))))
    if place.is_dir():
        return _from_folder(place)
    if place.is_file() and is_picture(place):
        raise ValueError(f"{place} is one picture: give {LAYOUTS}")
    if place.is_file():
        return Listing("csv", list(_from_csv(place)))
    raise FileNotFoundError(f"there is no {place}: give {LAYOUTS}")


def pictures(places: Sequence[Path]) -> list[Path]:
    """The given files, and the pictures in given folders and below them, in order.

    Raises:
        ValueError: a folder holds none.
    """
    found: list[Path] = []
    for place in places:
        below = [p for p in _files(place) if is_picture(p)] if place.is_dir() else [place]
        if not below:
            raise ValueError(f"{place} holds no picture")
        found += below
    return found


def is_picture(path: Path) -> bool:
    """Whether a file's name is that of a picture that Pillow reads."""
    Image.init()
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


# -------------------------------------------------------------------------------------------------------- folders


def _from_folder(place: Path) -> Listing:
    listing, folders = Listing("folder", []), _folders(place)
    names = {folder.name.lower() for folder in folders}
    parts, others = sorted(names & set(PARTS)), sorted(names - set(PARTS))
    if "train" in parts and len(parts) > 1 and others:
        raise ValueError(f"{place} holds {', '.join(parts)} and also {', '.join(others)}: expected is {LAYOUTS}")
    if "train" in parts and not others:
        for folder in folders:
            _add_classes(listing, folder, PARTS[folder.name.lower()])
    else:
        _add_classes(listing, place, None)
    return listing


def _add_classes(listing: Listing, place: Path, part: str | None) -> None:
    """Every folder in a place is a class; pictures may lie in folders below it."""
    if loose := [path for path in sorted(place.iterdir()) if path.is_file() and is_picture(path)]:
        raise ValueError(
            f"{place} has {count(len(loose), 'picture')} outside the classes' folders ({loose[0].name}): expected is "
            f"{LAYOUTS}"
        )
    folders = _folders(place)
    if not folders:
        raise ValueError(f"{place} holds no folder of a class: expected is {LAYOUTS}")
    empty = []
    for folder in folders:
        if any(folder.glob(f"*/{CONFIG}")):
            raise ValueError(f"{folder} holds runs, not pictures of a class: move it, or choose another --out")
        files = _files(folder)
        shown = [path for path in files if is_picture(path)]
        listing.others.update(path.suffix.lower() or path.name for path in files if not is_picture(path))
        listing.photos += [Photo(path, _name(folder.name), part) for path in shown]
        if not shown:
            empty.append(folder.name)
    if empty:
        raise ValueError(f"{place} has no picture of {', '.join(empty)}: fill the folder, or remove it")


def _folders(place: Path) -> list[Path]:
    return sorted(path for path in place.iterdir() if path.is_dir() and _is_shown(path.name))


def _is_shown(name: str) -> bool:
    """Whether a name is none of those that systems hide; macOS puts a folder of its own into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def _files(folder: Path) -> list[Path]:
    """All files in a folder and below it, in order, but for hidden ones. Links are followed, once, not upwards."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found: list[Path] = []
    here = folder.resolve()
    seen = {str(here), *map(str, here.parents)}
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        visible = {name: os.path.realpath(os.path.join(root, name)) for name in sorted(folders) if _is_shown(name)}
        folders[:] = [name for name, real in visible.items() if real not in seen]
        seen |= set(visible.values())
        paths = (Path(root, name) for name in sorted(names) if _is_shown(name))
        found += [path for path in paths if path.is_file() or not path.exists()]  # a link that leads nowhere, too
    return found


def _name(text: str) -> str:
    """A class's name in one spelling: file systems write an accent as a letter of its own, or not."""
    return unicodedata.normalize("NFC", text)


# ------------------------------------------------------------------------------------------------------------ CSV


def _from_csv(file: Path) -> Iterator[Photo]:
    seen: dict[Path, int] = {}
    for line, row in _rows(file):
        where, name, label = f"{file}:{line}", row["path"], row["label"]
        if not name or not label:
            raise ValueError(f"{where}: the row lacks its {'label' if name else 'path'}")
        path = file.parent / name
        if path in seen:
            raise ValueError(f"{where}: {name} is in line {seen[path]} too: leave one of the two")
        if not path.is_file():
            raise FileNotFoundError(f"{where}: there is no {path}: paths are relative to the CSV's folder")
        seen[path] = line
        yield Photo(path, _name(label), _part(row.get("split"), where))


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of a table with commas, semicolons or tabs between, and names in its first line."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is neither a folder nor a table in UTF-8 ({error}): unpack an archive, save a table as CSV in "
            "UTF-8"
        ) from None
    head = lines[0] if lines else ""
    table = csv.DictReader(lines, delimiter=max(",;\t", key=head.count), skipinitialspace=True)
    table.fieldnames = [name.strip().lower() for name in table.fieldnames or ()]
    if absent := [name for name in COLUMNS if name not in table.fieldnames]:
        raise ValueError(
            f"{file} has the columns {', '.join(table.fieldnames) or 'none'}; it lacks {' and '.join(absent)} "
            "(and may have split: train, val, test)"
        )
    for row in table:
        yield table.line_num, {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}


def _part(text: str | None, where: str) -> str | None:
    if text is None:
        return None
    if text.lower() not in PARTS:
        raise ValueError(f"{where}: split is {text!r}; it must be train, val or test")
    return PARTS[text.lower()]
