"""`abm-vtab list`: the tasks."""

from __future__ import annotations

import argparse
import json

import vtab_tasks
from abm_vision.runs.cli import Parser


def parser() -> Parser:
    """The tasks, and where to look for their data."""
    flags = Parser("abm-vtab list", description="The tasks, and where their data was found.")
    flags.add_argument("--data-dir", help="folder with vtab-1k files or with prepared TFDS data")
    flags.add_argument("--json", action="store_true", help="print JSON")
    return flags


def command(options: argparse.Namespace) -> int:
    """Print a line for every task."""
    rows = [
        {
            "task": task.name,
            "group": task.group,
            "classes": task.num_classes,
            "test_images": task.size("test"),
            "data": [
                f"{source}: {place or 'drawn offline'}"
                for source, place in vtab_tasks.locate(task.name, options.data_dir)
            ],
        }
        for task in vtab_tasks.TASKS.values()
    ]
    if options.json:
        print(json.dumps(rows))
        return 0
    print(f"{'task':<16}{'group':<13}{'classes':>7}{'test':>9}  data")
    for row in rows:
        print(
            f"{row['task']:<16}{row['group']:<13}{row['classes']:>7}{row['test_images']:>9}  {', '.join(row['data'])}"
        )
    return 0
