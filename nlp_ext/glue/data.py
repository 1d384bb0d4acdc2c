"""GLUE's examples from the hub, from local files in its columns, or made up by a grammar."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nlp_ext.glue import synthetic
from nlp_ext.glue.tasks import GlueTask

if TYPE_CHECKING:
    from datasets import Dataset

HUB, SYNTHETIC = "nyu-mll/glue", "synthetic"
# Ending of a local file to the reader of the package `datasets`.
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def read(task: GlueTask, split: str, data: str | os.PathLike[str] = "hub") -> Dataset:
    """The examples of a split, with the task's columns, `label` and `idx`.

    Args:
        task: one of `TASKS`.
        split: one of `task.sizes`.
        data: "hub" for `nyu-mll/glue`, "synthetic", or a folder with a file for every split in GLUE's
            columns, `train.jsonl` and so on (.json, .jsonl, .csv, .parquet), also below a folder of the task's name.

    Raises:
        ValueError: an unknown split, an empty file, a column that is missing, or a label that the task does not have.
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
    """A hash of all texts and labels."""
    found = hashlib.sha256()
    for example in examples:
        found.update(json.dumps(example, sort_keys=True).encode())
    return found.hexdigest()


def _from_hub(task: GlueTask, split: str) -> Dataset:
    import datasets

    try:
        name, split = ("ax", "test") if split == "test_ax" else (task.name, split)
        return datasets.load_dataset(HUB, name, split=split)
    except (OSError, ValueError) as error:  # a hub that is not reached, whatever the layer that notices
        raise OSError(
            f"{HUB} cannot be read from the hub ({' '.join(str(error).split())}): give local files with --data DIR, or "
            f"--data {SYNTHETIC}"
        ) from error


def _from_file(task: GlueTask, split: str, folder: Path) -> Dataset:
    import datasets

    path = _find(task, split, folder)
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        # In CSV "NA" and "None" are words like others.
        options = {"keep_default_na": False} if path.suffix == ".csv" else {}
        read = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as {READERS[path.suffix]} ({' '.join(str(cause).split())})") from error
    if not len(read):
        raise ValueError(f"{path} has no examples")
    if split.startswith("test") and "label" not in read.column_names:  # the server has them
        read = read.add_column("label", [-1] * len(read))
    absent = [column for column in (*task.columns, "label") if column not in read.column_names]
    if absent:
        raise ValueError(
            f"{path} has the columns {', '.join(read.column_names)}; {task.name} needs {', '.join(absent)} as well"
        )
    for column in task.columns:
        for number, text in enumerate(read[column], 1):
            if not isinstance(text, str):
                raise ValueError(f"{path}, example {number}: {column} is {text!r}; a text is needed")
    if not split.startswith("test"):
        for number, label in enumerate(read["label"], 1):
            _check(task, label, f"{path}, example {number}")
    if "idx" not in read.column_names:
        read = read.add_column("idx", list(range(len(read))))
    return read.select_columns([*task.columns, "label", "idx"])


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
        raise ValueError(f"{where}: the label is {label!r}; a number is needed")
    try:
        task.target(label)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
