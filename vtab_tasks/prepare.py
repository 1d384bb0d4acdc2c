"""Fetching and preparing the official data sets with tensorflow-datasets (TFDS), once, before anything is trained.

TensorFlow is needed here and nowhere else. TFDS keeps what it has downloaded and renames a data set's folder when it is
whole, so that an interrupted preparation goes on, and is never taken for a finished one.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtab_tasks.sources import tfds as source
from vtab_tasks.tasks import SPLITS, Task, get_task

GB = 1e9
# The archive, its unpacked files, and the prepared records, each of about the size of the download.
DISK_PER_DOWNLOAD = 3
# What the builders import to read raw files, by package.
_READERS = {
    "cv2": "opencv-python-headless (kitti, sun397, diabetic_retinopathy_detection)",
    "h5py": "h5py (dsprites, patch_camelyon)",
    "scipy": "scipy (oxford_flowers102, svhn_cropped)",
    "tensorflow": "tensorflow or tensorflow-cpu",
}


def prepare(
    tasks: Sequence[str],
    data_dir: str | os.PathLike[str] | None = None,
    *,
    manual_dir: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Download and prepare the data sets of some tasks, as TFDS's array_record files.

    Data sets that are there are left alone. Nothing is downloaded before all of what is asked for has been checked:
    packages, files that must be fetched by hand, and disk space.

    Args:
        tasks: Names of tasks. Tasks that share a data set share its preparation.
        data_dir: Where to put the data. By default TFDS's own folder.
        manual_dir: Where files are that had to be fetched by hand; by default `downloads/manual` in `data_dir`.
        say: Receives one line about every data set.

    Returns:
        The folder of every data set, in the order of the tasks.

    Raises:
        ValueError: A task is unknown, a package is missing, or what was prepared is not the official data set.
        FileNotFoundError: Files that must be fetched by hand are not there.
        OSError: There is too little disk space, or TFDS cannot download or write.
    """
    rows = list({row.tfds_name: row for row in map(get_task, tasks)}.values())
    place = source.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    manual = place / "downloads" / "manual" if manual_dir is None else Path(manual_dir).expanduser()
    missing = [row for row in rows if source.find(row, place) is None]
    if missing:
        tfds = _import_tfds()
        _check_manual(missing, manual)
        builders = {row.tfds_name: _builder(tfds, row, place) for row in missing}
        _check_disk(place, {name: _download_size(builder) for name, builder in builders.items()}, say)
    for row in rows:
        if row in missing:
            _prepare(tfds, builders[row.tfds_name], row, place, manual, say)
        else:
            say(f"{row.tfds_name}: there, {source.find(row, place)}")
    return [source.find(row, place) for row in rows]


def _import_tfds() -> Any:
    tfds = source.import_tfds()
    absent = [words for name, words in _READERS.items() if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f'preparing data sets needs {"; ".join(absent)}: pip install "abm-lora[prepare]". Reading prepared data '
            "needs none of them"
        )
    return tfds


def _builder(tfds: Any, task: Task, place: Path) -> Any:
    return tfds.builder(task.tfds_name, data_dir=place, file_format="array_record")


def _check_manual(tasks: Sequence[Task], manual: Path) -> None:
    problems = []
    for task in tasks:
        absent = [pattern for pattern in task.manual_files if next(manual.glob(pattern), None) is None]
        if absent:
            looked = f"looked for {', '.join(task.manual_files)}; missing: {', '.join(absent)}"
            problems.append(f"{task.name}: {task.manual} Home: {task.url}; {looked}")
    if problems:
        words = "\n".join(problems)
        raise FileNotFoundError(
            f"what a program cannot download is not in {manual}; fetch it, or leave these tasks out.\n{words}"
        )


def _download_size(builder: Any) -> int:
    """Bytes, as TFDS has recorded them with the checksums of the files."""
    return sum(info.size or 0 for info in builder.url_infos.values())


def _check_disk(place: Path, downloads: dict[str, int], say: Callable[[str], None]) -> None:
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, DISK_PER_DOWNLOAD * sum(downloads.values())
    sizes = ", ".join(f"{name} {size / GB:.2f} GB" for name, size in downloads.items())
    summary = f"to download: {sizes}; disk needed about {needed / GB:.1f} GB, free {free / GB:.1f} GB in {place}"
    if free < needed:
        raise OSError(f"too little disk space. {summary}. Give another data_dir, or fewer tasks at a time")
    say(summary)


def _prepare(tfds: Any, builder: Any, task: Task, place: Path, manual: Path, say: Callable[[str], None]) -> None:
    import requests  # comes with TFDS

    data_set = place / task.tfds_name
    data_set.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(data_set / "prepare.lock", timeout=0):
            for rest in data_set.glob("incomplete.*"):  # of a preparation that was killed
                shutil.rmtree(rest)
            say(f"{task.tfds_name}: preparing in {data_set}")
            settings = tfds.download.DownloadConfig(manual_dir=manual if task.manual else None)
            try:
                builder.download_and_prepare(download_config=settings)
            except (tfds.download.DownloadError, requests.RequestException) as error:
                raise OSError(
                    f"{task.tfds_name} could not be downloaded ({error}). What has come is kept: run the same again, "
                    f"or put the file into {place / 'downloads'} as TFDS names it; the data set's home is {task.url}"
                ) from error
    except Timeout:
        raise OSError(f"another process is preparing {task.tfds_name} in {data_set}: wait for it to end") from None
    for split in SPLITS:
        source.load(task, split, place)
    say(f"{task.tfds_name}: ready, {source.find(task, place)}")
