"""Identity of a task's items by content, wherever the files lie: hashes of images and labels."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vtab_tasks.render.cache import code_hash
from vtab_tasks.sources.folder import FolderItems
from vtab_tasks.sources.rendered import drawing
from vtab_tasks.sources.tfds import TfdsItems
from vtab_tasks.taskdata import TaskData

# (files, name, compute): the value of `compute`, which may be cached under that name while the files are unchanged.
Remember = Callable[[Sequence[Path], str, Callable[[], str]], str]


def content(data: TaskData, remember: Remember) -> dict[str, str]:
    """Hash the items' `images` and `labels`; every value names the source first.

    Images are hashed as they are encoded. Rendered ones are named by a hash of the code that draws them.
    """
    if isinstance(data.items, FolderItems):
        paths = [data.items.list_file.parent / data.items.paths[position] for position in data.positions]
        images = remember(paths, "bytes", lambda: _sha256(path.read_bytes() for path in paths))
        labels = _sha256([data.labels.tobytes()])
    elif isinstance(data.items, TfdsItems):
        items, paths = data.items, sorted(p for p in data.items.directory.iterdir() if p.is_file())
        name = f"{data.task.name} {data.split} {_sha256([data.positions.tobytes()])}"
        images = remember(paths, f"images of {name}", lambda: _sha256(items.encoded(data.positions)))
        labels = remember(paths, f"labels of {name}", lambda: _sha256([data.labels.tobytes()]))
    else:
        drawn, labelled = drawing(data.task), code_hash("../tasks", "../labels")
        return {"images": f"rendered, code {drawn}", "labels": f"rendered, code {labelled}"}
    return {"images": f"{data.source}, sha256 {images}", "labels": f"{data.source}, sha256 {labels}"}


def _sha256(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts in order, each preceded by its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
