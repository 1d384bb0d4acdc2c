"""Files that are either whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


class CannotWrite(OSError):
    """A file or folder cannot be written: the disk is full, read-only, or something is in the way."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Whatever fails while `path` is written becomes a `CannotWrite` with one message."""
    try:
        yield
    except CannotWrite:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CannotWrite(
            f"cannot write {path} ({reason}); free space or choose another place, then run the same again"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call `write` with a name beside `path`, then rename: a killed run leaves no half file under `path`.

    Raises:
        CannotWrite: as `writing`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.part{path.suffix}")
    with writing(path):
        try:
            write(beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8.

    Raises:
        CannotWrite: as `writing`.
    """
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused, as the JSON standard has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError: it is damaged; the message names it, and the remedy.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        json.dumps(content, ensure_ascii=False).encode()  # a half of a surrogate pair cannot be shown or written
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; {remedy}")
    return content
