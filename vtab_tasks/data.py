"""The two verbs: load a task's data, and locate it."""

import os
from pathlib import Path

from vtab_tasks.sources import folder, rendered, tfds
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import get_task

# In the order in which `auto` prefers them. Each has find(task, data_dir) and load(task, split, data_dir).
_REAL = {"folder": folder, "tfds": tfds}
_SOURCES = {**_REAL, "rendered": rendered}


def locate(task: str, data_dir: str | os.PathLike[str] | None = None) -> list[tuple[str, str | None]]:
    """List where a task's data is found, best source first.

    Args:
        task: name of a task.
        data_dir: folder that holds community folders or TFDS data; by default TFDS's own folder.

    Returns:
        (source, location) pairs. The location of `rendered`, which is drawn, is None.

    Raises:
        ValueError: there is no such task.
    """
    row, data_dir = get_task(task), _expanded(data_dir)
    found: list[tuple[str, str | None]] = []
    for name, module in _REAL.items():
        location = module.find(row, data_dir)
        if location is not None:
            found.append((name, str(location)))
    if rendered.can_draw(row):
        found.append(("rendered", None))
    return found


def load(task: str, split: str, *, source: str = "auto", data_dir: str | os.PathLike[str] | None = None) -> TaskData:
    """Load one split of a task.

    Args:
        task: name of a task, see `TASKS`.
        split: one of `SPLITS`.
        source: `folder` (the community's `vtab-1k` folders), `tfds` (data that tensorflow-datasets has
            prepared), `rendered` (drawn here), or `auto`: the first of these that is found, and real data
            only where a `data_dir` is given.
        data_dir: folder that holds community folders or TFDS data. By default TFDS's own: `$TFDS_DATA_DIR`
            or `~/tensorflow_datasets`.

    Returns:
        A sequence of uint8 images (H, W, 3) and integer labels.

    Raises:
        ValueError: a name is unknown, or what was found is not the task's data.
        FileNotFoundError: the data, or a part of it, is missing.
    """
    row, data_dir = get_task(task), _expanded(data_dir)
    row.parts(split)  # an unknown split is an error before any search
    if source == "auto":
        source = _best_source(task, data_dir)
    if source not in _SOURCES:
        raise ValueError(f"unknown source {source!r}: choose one of auto, {', '.join(_SOURCES)}")
    return _SOURCES[source].load(row, split, data_dir)


def _expanded(data_dir: str | os.PathLike[str] | None) -> Path | None:
    return None if data_dir is None else Path(data_dir).expanduser()


def _best_source(task: str, data_dir: str | os.PathLike[str] | None) -> str:
    """The first source that is found; a folder that the user named must hold real data."""
    found = [name for name, _ in locate(task, data_dir)]
    if data_dir is not None and "rendered" in found:
        found.remove("rendered")
    if found:
        return found[0]
    row = get_task(task)
    place = tfds.default_data_dir() if data_dir is None else data_dir
    hint = '; source="rendered" draws this task offline' if rendered.can_draw(row) else ""
    raise FileNotFoundError(
        f"no data for {task} in {place}. Looked for the community layout "
        f"({' or '.join(folder.layouts(row))}, with lists such as train800val200.txt) and for TFDS data "
        f"({row.tfds_name} {' or '.join(row.tfds_versions)}){hint}"
    )
