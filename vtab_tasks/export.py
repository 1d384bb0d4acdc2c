"""Write any source's images in the community's folder layout, as PNG."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from vtab_tasks.data import load, locate
from vtab_tasks.files import write_whole
from vtab_tasks.sources.folder import ORIGIN
from vtab_tasks.sources.rendered import drawing
from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import SPLITS, get_task

CHUNK = 256  # images read at a time


def export(
    task: str,
    out: str | os.PathLike[str],
    *,
    source: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    splits: Sequence[str] = SPLITS,
    show_progress_bar: bool = True,
) -> Path:
    """Write splits of a task as `OUT/vtab-1k/<folder>/images/<split>/<index>.png` with their lists.

    PNG keeps every pixel; the community's own files are JPEG. `origin.json` in the task's folder records where the
    images came from. A list is written after its last image and existing images are not written again, so that an
    interrupted export is resumed.

    Args:
        task: name of a task.
        out: folder to write below; one that is called `vtab-1k` itself gets no other in it.
        source, data_dir: where the images come from, as for `load`.
        splits: splits to write.
        show_progress_bar: show a bar for every split.

    Returns:
        The task's folder.

    Raises:
        ValueError: names are unknown, or the folder holds images of another origin.
        FileNotFoundError: the data is missing.
    """
    row = get_task(task)
    folder = _community(Path(out).expanduser()) / row.folders[0]
    if source in ("auto", "folder"):
        own = [name for name, place in locate(task, data_dir) if place is not None and _same(place, folder)]
        if own:
            raise ValueError(f"{folder} is to be written, and is below data_dir {data_dir} too: name another --source")
    found = {split: load(task, split, source=source, data_dir=data_dir) for split in splits}
    _claim(folder, next(iter(found.values())))
    for split, data in found.items():
        _write_split(folder, split, data, show_progress_bar)
    return folder


def _community(out: Path) -> Path:
    return out if out.resolve().name == "vtab-1k" else out / "vtab-1k"


def _claim(folder: Path, data: TaskData) -> None:
    """Record where the images come from, or check that the existing ones have the same origin."""
    origin = {
        "task": data.task.name,
        "source": data.source,
        "location": data.location and str(Path(data.location).resolve()),
        "format": "png",
        # Images drawn by two versions of the code must not mix.
        **({"description": data.description, "code": drawing(data.task)} if data.source == "rendered" else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not any(not path.name.startswith(".") for path in folder.iterdir()):  # hidden: interrupted export
        write_whole(folder / ORIGIN, json.dumps(origin, indent=2).encode())
        return
    try:
        there = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        there = "of unknown origin"
    except ValueError as error:
        raise ValueError(f"{folder / ORIGIN} is damaged ({error}): give another folder, or delete this one") from error
    if there != origin:
        raise ValueError(f"{folder} holds images {there}, these are {origin}: give another folder")


def _same(place: str, folder: Path) -> bool:
    return Path(place).resolve() == folder.resolve()


def _write_split(folder: Path, split: str, data: TaskData, show_progress_bar: bool) -> None:
    list_file = folder / f"{split}.txt"
    images = folder / "images" / split
    images.mkdir(parents=True, exist_ok=True)
    names = [f"images/{split}/{i:06d}.png" for i in range(len(data))]
    left = [i for i, name in enumerate(names) if not (folder / name).exists()]
    if list_file.exists() and not left:
        return
    with tqdm(total=len(left), desc=f"{data.task.name} {split}", disable=not show_progress_bar) as bar:
        for start in range(0, len(left), CHUNK):
            chunk = left[start : start + CHUNK]
            for i, pixels in zip(chunk, data.images(chunk), strict=True):
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                write_whole(folder / names[i], png.getvalue())
                bar.update()
    lines = (f"{name} {label}\n" for name, label in zip(names, data.labels, strict=True))
    write_whole(list_file, "".join(lines).encode())
