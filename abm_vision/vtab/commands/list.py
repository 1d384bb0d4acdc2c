"""`abm-vtab list`: the tasks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vtab_tasks
from abm_vision.runs.cli import Parser
from abm_vision.runs.markup import one_line
from abm_vision.vtab.config import EVALUATIONS


def parser() -> Parser:
    """The tasks, and where to look for their data."""
    flags = Parser(
        "abm-vtab list",
        description="The tasks, where their data was found, and whether a run would accept it.",
    )
    flags.add_argument("--data-dir", help="folder with vtab-1k files or with prepared TFDS data")
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


def command(options: argparse.Namespace) -> int:
    """Print a line for every task."""
    place = options.data_dir
    if place is not None and not Path(place).expanduser().is_dir():
        raise FileNotFoundError(f"--data-dir {place} is no folder: give the one that holds vtab-1k or prepared data")
    rows = [
        {
            "task": task.name,
            "group": task.group,
            "classes": task.num_classes,
            "test_images": task.size("test"),
            "data": list(_found(task.name, place)),
        }
        for task in vtab_tasks.TASKS.values()
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{'task':<16}{'group':<13}{'classes':>7}{'test':>9}  data")
    for row in rows:
        words = ", ".join(map(_in_words, row["data"]))
        print(f"{row['task']:<16}{row['group']:<13}{row['classes']:>7}{row['test_images']:>9}  {words}")
    return 0


def _found(task: str, data_dir: str | None) -> Iterator[dict[str, Any]]:
    """Every source of a task's data: its location, None if drawn; and why a run would refuse it, None if it would not.

    A run loads its two splits in the same way.
    """
    for source, place in vtab_tasks.locate(task, data_dir):
        refused = None
        try:
            for split in EVALUATIONS["test"]:
                vtab_tasks.load(task, split, source=source, data_dir=data_dir)
        except (ValueError, OSError) as error:
            refused = one_line(error)
        yield {"source": source, "location": place, "refused": refused}


def _in_words(data: dict[str, Any]) -> str:
    words = f"{data['source']}: {data['location'] or 'drawn offline'}"
    if data["refused"]:
        return f"{words} (REFUSED: {data['refused']})"
    return f"{words} (accepted)" if data["location"] else words
