"""Rows of a local file, each with its place: JSON, lines of JSON, CSV and Parquet.

`datasets` would guess types (a text that looks like a date becomes one), fill in missing columns, and not name the line
of a mistake.
"""

from __future__ import annotations

import csv
import io
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, dict[str, Any]]  # where it is, for messages, and its columns


def read_rows(path: Path) -> list[Row]:
    """Read all rows of a file with one of the endings in `READERS`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, not in UTF-8, or not of its format; the message names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    rows = []
    for where, row in READERS[path.suffix.lower()](path):
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {reprlib.repr(row)}; needed is an object, with columns")
        rows.append((where, row))
    if not rows:
        raise ValueError(f"{path} has no examples")
    return rows


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Read an array, a value on every line (blank ones are ignored), or one object."""
    text = _text(path)
    if text.lstrip().startswith("["):
        values = _decode(text, path, 1)
        yield from ((f"{path}, example {number}", value) for number, value in enumerate(values, 1))
        return
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if len(lines) > 1 and lines[0][1].strip() == "{":  # one object, over several lines
        yield f"{path}", _decode(text, path, 1)
        return
    for number, line in lines:
        yield f"{path}:{number}", _decode(line, path, number)


def checked_text(value: object, what: str) -> str:
    """Return the value if it is a text.

    Raises:
        ValueError: it is not, or has halves of characters, which no tokeniser accepts.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} is {reprlib.repr(value)}; a text is needed")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} has half a character ({value[error.start]!a}) at {error.start}: fix it") from None
    return value


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
        place, found = text.find("\0"), "a NUL byte"
    except UnicodeDecodeError as error:
        place, found = error.start, f"the byte 0x{raw[error.start]:02x}"
    if place >= 0:
        line = raw[:place].count(b"\n") + 1
        raise ValueError(f"{path}:{line} has {found}, so it is not UTF-8 (but UTF-16, Latin-1, ...): save it as UTF-8")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return text


def _decode(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place, reason = line + error.lineno - 1, f"{error.msg}, column {error.colno}"
    except (ValueError, RecursionError) as error:
        place, reason = line, str(error)
    raise ValueError(f"{path}:{place} is not JSON ({reason}); needed is an object on every line, or an array of them")


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} occurs twice")
        found[name] = value
    return found


def _csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a file whose first line names the columns; every value is a text."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(f"{path}:{reader.line_num} has not the {len(reader.fieldnames)} columns of the first")
            yield f"{path}:{reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.reader.line_num} is not CSV ({error})") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not Parquet ({' '.join(str(error).split())})") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, example {number}", row


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".json": json_rows,
    ".jsonl": json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
