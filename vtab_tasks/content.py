"""What a task's items are, wherever they lie: hashes of their images and labels."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from vtab_tasks.render.cache import code_hash
from vtab_tasks.sources.folder import FolderItems
from vtab_tasks.sources.rendered import drawing
from vtab_tasks.sources.tfds import TfdsItems
from vtab_tasks.taskdata import TaskData

# (files, name, compute): what `compute` gives, perhaps kept under that name while the files stay as they are.
Remember = Callable[[Sequence[Path], str, Callable[[], str]], str]


def content(data: TaskData, remember: Remember) -> dict[str, str]:
    """Hashes of the `images` and of the `labels` that these items are, in words that begin with their source.

    Encoded images are hashed, not decoded ones. What is drawn is named by the code that draws it.
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
    """Of the parts one after another, each behind its length."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()
