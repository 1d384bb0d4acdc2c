"""The user's cache folder, and files that are either whole or not there."""

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """Return `abm_lora` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    return user_cache_path("abm_lora")


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a killed process leaves no half file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
