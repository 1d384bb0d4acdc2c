"""`abm-vtab prepare`: datasets, or folders of images."""

from __future__ import annotations

import argparse

import vtab_tasks
from abm_vision.abm.bars import watched
from abm_vision.runs.cli import Parser, say
from abm_vision.vtab.config import SOURCES


def parser() -> Parser:
    """Datasets to prepare, or to write as image folders."""
    flags = Parser(
        "abm-vtab prepare",
        description="Download and prepare official datasets with tensorflow-datasets (this alone needs TensorFlow: "
        'pip install -e ".[prepare]"). Or, with --to folder, write images in the community\'s layout, as PNG.',
    )
    flags.add_argument("--task", required=True, help="tasks with commas between, or all")
    flags.add_argument("--data-dir", help="where prepared data is, or is to be (default: TFDS's own folder)")
    flags.add_argument("--manual-dir", help="files fetched by hand (default: DATA_DIR/downloads/manual)")
    flags.add_argument("--to", choices=("tfds", "folder"), default="tfds", help="what to write (default: tfds)")
    flags.add_argument(
        "--out", metavar="DIR", help="with --to folder: writes DIR/vtab-1k/TASK, or DIR/TASK if DIR is called vtab-1k"
    )
    flags.add_argument(
        "--source", choices=SOURCES, default="auto", help="with --to folder: where images come from (default: auto)"
    )
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    return flags


def command(options: argparse.Namespace) -> int:
    """Write the data."""
    tasks = list(vtab_tasks.TASKS) if options.task == "all" else options.task.split(",")
    for task in tasks:
        vtab_tasks.get_task(task)
    if options.to == "tfds":
        if options.out or options.source != "auto":
            raise ValueError("--out and --source go with --to folder; TFDS data is written to --data-dir")

        from vtab_tasks.prepare import prepare

        prepare(tasks, options.data_dir, manual_dir=options.manual_dir, say=say)
        return 0
    if not options.out:
        raise ValueError("--to folder needs --out, the folder to write vtab-1k/TASK below")
    if options.manual_dir:
        raise ValueError("--manual-dir goes with --to tfds")

    from vtab_tasks.export import export

    for task in tasks:
        folder = export(
            task,
            options.out,
            source=options.source,
            data_dir=options.data_dir,
            show_progress_bar=not options.quiet and watched(),
        )
        say(f"{task}: {folder}")
    return 0
