"""Models that are made once, and kept in the user's cache in transformers' format. Processes share them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from abm_vision.abm.files import read_object, write_json, writing
from abm_vision.runs.content import cache_folder, sha256_of

RECIPE = "recipe.json"


def place_of(name: str, recipe: Mapping[str, Any]) -> Path:
    """The folder of a model that is made by this recipe."""
    digest = hashlib.sha256(repr(sorted(recipe.items())).encode()).hexdigest()[:12]
    return cache_folder() / f"{name}-{digest}"


def cached_model(name: str, recipe: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Return the folder of a model, which is made if it is not there, or not whole.

    Args:
        name: with which the folder's name begins.
        recipe: all that decides what is made.
        make: writes the files into a folder; what it returns is recorded beside the recipe.

    Raises:
        CannotWrite: the cache cannot be written.
    """
    folder = place_of(name, recipe)
    with writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_whole(folder):
            beside = folder.with_suffix(f".{os.getpid()}.part")
            try:
                with writing(folder):
                    shutil.rmtree(beside, ignore_errors=True)  # of a killed process with this number
                    beside.mkdir()
                    more = make(beside)
                    write_json(beside / RECIPE, {**recipe, **more, "sha256": _hashes(beside)})
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file of the model is as it was made."""
    try:
        return recorded(folder).get("sha256") == _hashes(folder)
    except (FileNotFoundError, ValueError):
        return False


def recorded(folder: Path) -> dict[str, Any]:
    """The recipe by which the model was made, and what was recorded beside it.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is damaged.
    """
    return read_object(folder / RECIPE, "delete the folder: it is made again")


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file except the recipe."""
    return {path.name: sha256_of([path]) for path in sorted(folder.iterdir()) if path.name != RECIPE}
