"""One's own images: listed, read once to find what is broken, and split into training, validation and test."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abm_vision.abm.arguments import count
from abm_vision.images.listing import LAYOUTS, Listing, Photo, find
from abm_vision.images.photos import Photos, PhotoSplit, check_readable
from abm_vision.runs.content import Origin, sha256_of
from vtab_tasks.sources.duplicates import contents, describe, glance


@dataclass(frozen=True, eq=False)
class Dataset:
    """One's own images, whole.

    Attributes:
        source: `folder`, `csv` or `datasets`.
        location: as it was given.
        classes: names, sorted; a label is a position in them.
        train, validation: images to train on, and to choose the epoch by.
        test: those of a part named test, else None.
        skipped: broken files that were left out, with the reason.
        notes: what else the owner should know, a line each.
    """

    source: str
    location: str
    classes: tuple[str, ...]
    train: PhotoSplit
    validation: PhotoSplit
    test: PhotoSplit | None
    skipped: Mapping[Path, str]
    notes: tuple[str, ...]

    @cached_property
    def splits(self) -> dict[str, PhotoSplit]:
        """The parts that there are, by name."""
        found = {"training": self.train, "validation": self.validation, "test": self.test}
        return {name: split for name, split in found.items() if split is not None}

    def origin(self) -> Origin:
        """The content of all parts: bytes of the files in order, and labels with the names of the classes."""
        found: Origin = {}
        for name, split in self.splits.items():
            labels = [self.classes[label] for label in split.labels]
            found[f"{name} images"] = f"{self.source}, sha256 {sha256_of(split.paths)}"
            found[f"{name} labels"] = f"sha256 {hashlib.sha256(json.dumps(labels).encode()).hexdigest()}"
        return found


def load(place: str | None, validation: float, seed: int, skip_broken: bool) -> Dataset:
    """Find, check and split the images at a place.

    Every file is decoded once, on all cores; what came of it is cached while the files are unchanged.

    Args:
        place: a folder or a CSV file (see `images.listing`).
        validation: share of every class for validation, where no part is named so.
        seed: of this split.
        skip_broken: leave out files that cannot be read.

    Raises:
        FileNotFoundError, ValueError: there are no images by class; files are broken; or too few are left. One message,
            which names all of them.
    """
    if place is None:
        raise ValueError(f"no data are given: give {LAYOUTS}")
    listing = find(place)
    bad = check_readable([photo.path for photo in listing.photos], skip_broken)
    photos = [photo for photo in listing.photos if photo.path not in bad]
    classes = _classes(place, photos)
    hashes = contents((photo.path, glance(photo.path)) for photo in photos)
    labels = np.array([classes.index(photo.label) for photo in photos], dtype=np.int64)
    parts = _parts(photos, labels, hashes, classes, validation, seed)
    items = Photos(tuple(photo.path for photo in photos), labels)
    split = {part: PhotoSplit(items, positions) for part, positions in parts.items()}
    return Dataset(
        source=listing.source,
        location=place,
        classes=classes,
        train=split["train"],
        validation=split["validation"],
        test=split.get("test"),
        skipped=bad,
        notes=tuple(_notes(listing, parts, labels, hashes, bad)),
    )


# ------------------------------------------------------------------------------------------------------- the split


def _classes(place: str, photos: Sequence[Photo]) -> tuple[str, ...]:
    """All classes, which training must have.

    Raises:
        ValueError: fewer than two, or one that is in a part for validation or test alone.
    """
    trained = sorted({photo.label for photo in photos if photo.part in ("train", None)})
    if len(trained) < 2:
        folders = {photo.path.parent.name for photo in photos}
        nested = len(folders) > 1
        below = f"; below it are {', '.join(sorted(folders)[:5])}: give the folder that holds them" if nested else ""
        raise ValueError(
            f"{place} has {count(len(trained), 'class')} to train on ({', '.join(trained) or 'none'}), two or more are "
            f"needed{below}. Expected is {LAYOUTS}"
        )
    if foreign := sorted({photo.label for photo in photos} - set(trained)):
        raise ValueError(f"{place} has pictures to validate or test on, and none to train on, of {', '.join(foreign)}")
    return tuple(trained)


def _parts(
    photos: Sequence[Photo],
    labels: NDArray[np.int64],
    hashes: Sequence[bytes],
    classes: Sequence[str],
    share: float,
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    """Positions by part, each in order; validation is split off the training part if there is none."""
    given = np.array([photo.part or "train" for photo in photos])
    parts = {part: np.flatnonzero(given == part) for part in ("train", "validation", "test")}
    if not len(parts["validation"]):
        drawn = _draw(parts["train"], labels, hashes, classes, share, seed)
        parts |= {"train": np.setdiff1d(parts["train"], drawn), "validation": drawn}
    return {part: positions for part, positions in parts.items() if len(positions)}


def _draw(
    positions: NDArray[np.int64],
    labels: NDArray[np.int64],
    hashes: Sequence[bytes],
    classes: Sequence[str],
    share: float,
    seed: int,
) -> NDArray[np.int64]:
    """A share of every class by seed, one picture at least; files of the same content go together.

    Raises:
        ValueError: a class has fewer than two different pictures.
    """
    groups: dict[bytes, list[int]] = {}
    for position in positions:
        groups.setdefault(hashes[position], []).append(int(position))
    drawn: list[int] = []
    few, generator = [], np.random.default_rng(seed)
    for label, name in enumerate(classes):
        own = [group for group in groups.values() if labels[group[0]] == label]
        wanted, taken = max(1, round(share * sum(map(len, own)))), 0
        if len(own) < 2:
            few.append(name)
        for k in generator.permutation(len(own))[:-1]:  # one stays
            if taken < wanted:
                drawn += own[k]
                taken += len(own[k])
    if few:
        raise ValueError(
            f"of {', '.join(few)} there are fewer than two different pictures: one is needed to train on, and one to "
            "validate on"
        )
    return np.sort(np.array(drawn, dtype=np.int64))


# -------------------------------------------------------------------------------------------------- what is reported


def _notes(
    listing: Listing,
    parts: Mapping[str, NDArray[np.int64]],
    labels: NDArray[np.int64],
    hashes: Sequence[bytes],
    bad: Mapping[Path, str],
) -> list[str]:
    """Lines on what was left out, and on pictures with the same content."""
    notes = []
    if listing.others:
        kinds = ", ".join(f"{number} {kind}" for kind, number in listing.others.most_common(5))
        notes.append(f"{count(listing.others.total(), 'file')} left out, no pictures by name: {kinds}")
    if bad:
        notes.append(f"{count(len(bad), 'broken file')} left out: {', '.join(map(str, bad))}")
    trained = {hashes[k] for k in parts["train"]}
    for part, positions in parts.items():
        own = [hashes[k] for k in positions]
        if found := describe(own, labels[positions].tolist(), trained if part != "train" else set()):
            notes.append(f"{part}: {found}")
    return notes
