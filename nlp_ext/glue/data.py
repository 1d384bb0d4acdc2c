"""GLUE's examples from the hub, from local files with its columns, or made up by a grammar."""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_ext.glue import synthetic
from nlp_ext.glue.tasks import GlueTask
from nlp_ext.rows import READERS, checked_text, read_rows

if TYPE_CHECKING:
    from datasets import Dataset

HUB, SYNTHETIC = "nyu-mll/glue", "synthetic"


def read(task: GlueTask, split: str, data: str | os.PathLike[str] = "hub") -> Dataset:
    """Read the examples of a split, with the task's columns, `label` and `idx`.

    Args:
        task: one of `TASKS`.
        split: one of `task.sizes`.
        data: "hub" for `nyu-mll/glue`, "synthetic", or a folder with a file for every split in GLUE's
            columns, `train.jsonl` and so on (.json, .jsonl, .csv, .parquet), also below a folder of the task's name.

    Raises:
        ValueError: an unknown split, an empty file, a missing column, or a label that the task does not have.
        FileNotFoundError: there is no file of that split.
        OSError: the hub cannot be reached.
    """
    import datasets  # slow to import

    if split not in task.sizes:
        raise ValueError(f"{task.name} has no split {split!r}; there are {', '.join(task.sizes)}")
    if data == SYNTHETIC:
        return datasets.Dataset.from_list(synthetic.examples(task.name, split))
    if data == "hub":
        return _from_hub(task, split)
    return _from_file(task, split, Path(data).expanduser())


def digest(examples: Dataset) -> str:
    """Hash all texts and labels."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps(example, sort_keys=True).encode())
    return found.hexdigest()


def _from_hub(task: GlueTask, split: str) -> Dataset:
    import datasets

    try:
        name, split = ("ax", "test") if split == "test_ax" else (task.name, split)
        return datasets.load_dataset(HUB, name, split=split)
    except (OSError, ValueError) as error:  # an unreachable hub, whichever layer reports it
        raise OSError(
            f"{HUB} cannot be read from the hub ({' '.join(str(error).split())}): give local files with --data DIR, or "
            f"--data {SYNTHETIC}"
        ) from error


def _from_file(task: GlueTask, split: str, folder: Path) -> Dataset:
    import datasets

    path = _find(task, split, folder)
    rows = read_rows(path)
    labels = [] if split.startswith("test") else ["label"]  # the server has those of test splits
    numbered = ["idx"] if any("idx" in row for _, row in rows) else []
    needed = [*task.columns, *labels, *numbered]
    found = []
    for number, (where, row) in enumerate(rows):
        if absent := [column for column in needed if column not in row]:
            raise ValueError(f"{where} has the columns {', '.join(row)}; {task.name} needs {', '.join(absent)} as well")
        texts = {column: checked_text(row[column], f"{where}: {column}") for column in task.columns}
        numbers = {"label": row["label"] if labels else -1, "idx": row.get("idx", number)}
        if path.suffix == ".csv":
            numbers = {column: _number(value) for column, value in numbers.items()}
        if labels:
            _check(task, numbers["label"], where)
        if type(numbers["idx"]) is not int:
            raise ValueError(f"{where}: idx is {reprlib.repr(numbers['idx'])}; a whole number is needed")
        found.append({**texts, **numbers})
    return datasets.Dataset.from_list(found)


def _number(value: str | int) -> int | float | str:
    """A value of CSV, which is a text, as a number if it is one."""
    text = str(value)
    if re.fullmatch("-?[0-9]{1,9}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]+\.[0-9]+", text) else text


def _find(task: GlueTask, split: str, folder: Path) -> Path:
    places = [folder / task.name, folder]
    found = [place / f"{split}{ending}" for place in places for ending in READERS]
    for path in found:
        if path.is_file():
            return path
    names = ", ".join(f"{split}{ending}" for ending in READERS)
    raise FileNotFoundError(
        f"no examples of {task.name}/{split} in {folder}: looked there and in {places[0]} for {names}"
    )


def _check(task: GlueTask, label: object, where: str) -> None:
    if not isinstance(label, (int, float)) or isinstance(label, bool):
        raise ValueError(f"{where}: the label is {reprlib.repr(label)}; a number is needed")
    try:
        task.target(label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
