"""Download and prepare the official datasets with tensorflow-datasets (TFDS), once, before any training.

TensorFlow is needed here and nowhere else. TFDS keeps completed downloads and renames a dataset's folder once it is
complete, so that an interrupted preparation is resumed, and is never taken for a finished one. A file whose download
was interrupted is downloaded again from its beginning.
"""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vtab_tasks.sources import tfds as source
from vtab_tasks.tasks import SPLITS, Task, get_task

GB = 1e9
# The archive, its unpacked files, and the prepared records, each of about the size of the download.
DISK_PER_DOWNLOAD = 3
# The least size of a record in bytes: wrapping outweighs small images. TFDS writes records twice.
DISK_PER_EXAMPLE = 2 * 500
# Modules that the builders import to read raw files, and their packages.
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
    """Download and prepare the datasets of some tasks, as TFDS's array_record files.

    Datasets that are prepared already are kept. Packages, files that must be fetched by hand and disk space are checked
    for all tasks before the first download.

    Args:
        tasks: names of tasks. Tasks that share a dataset share its preparation.
        data_dir: folder for the data, TFDS's own by default.
        manual_dir: folder of files that were fetched by hand; by default `downloads/manual` in `data_dir`.
        say: called with one line per dataset.

    Returns:
        The folder of every dataset, in the order of the tasks.

    Raises:
        ValueError: a task is unknown, a package is missing, or what was prepared is not the official dataset.
        FileNotFoundError: files that must be fetched by hand are missing.
        OSError: there is too little disk space, or TFDS cannot download or write.
    """
    rows = list({row.tfds_name: row for row in map(get_task, tasks)}.values())
    place = source.default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    manual = place / "downloads" / "manual" if manual_dir is None else Path(manual_dir).expanduser()
    missing = [row for row in rows if source.find(row, place) is None]
    for row in rows:
        if row not in missing:
            _check_usable(row, place)
            say(f"{row.tfds_name}: already prepared, {source.find(row, place)}")
    if missing:
        tfds = _import_tfds()
        _check_manual(missing, manual)
        builders = {row.tfds_name: _builder(tfds, row, place) for row in missing}
        _check_disk(place, [_need(builders[row.tfds_name], row, place, manual) for row in missing], say)
        for row in missing:
            _prepare(tfds, builders[row.tfds_name], row, place, manual, say)
    return [source.find(row, place) for row in rows]


def _check_usable(task: Task, place: Path) -> None:
    """Raise unless every split can be read from the existing data; the message names its folder."""
    try:
        for split in SPLITS:
            source.load(task, split, place)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(
            f"{source.find(task, place)} exists but cannot be used: {error}. Delete it and run the same command again"
        ) from error


def _import_tfds() -> Any:
    tfds = source.import_tfds()
    absent = [words for name, words in _READERS.items() if importlib.util.find_spec(name) is None]
    if absent:
        raise ValueError(
            f'preparing datasets needs {"; ".join(absent)}: pip install -e ".[prepare]". Reading prepared data '
            "needs none of them"
        )
    return tfds


def _builder(tfds: Any, task: Task, place: Path) -> Any:
    builder = tfds.builder(task.tfds_name, data_dir=place, file_format="array_record")
    if Path(builder.data_dir).exists():  # TFDS would take it for prepared
        raise FileExistsError(
            f"{builder.data_dir} has no dataset_info.json, so it is incomplete: delete it and run this again"
        )
    return builder


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


@dataclass(frozen=True)
class Need:
    """Bytes of a dataset that remain to be downloaded, and bytes of disk that its preparation still takes."""

    name: str
    download: int
    disk: int


def _need(builder: Any, task: Task, place: Path, manual: Path) -> Need:
    """From the file sizes that TFDS records with their checksums, less the files that exist."""
    from tensorflow_datasets.core.download.resource import get_dl_fname

    infos = builder.url_infos
    whole = sum(info.size or 0 for info in infos.values())
    names = (get_dl_fname(url, info.checksum) for url, info in infos.items())
    there = sum(path.stat().st_size for name in names if (path := place / "downloads" / name).is_file())
    by_hand = sum(_size(path) for pattern in task.manual_files for path in manual.glob(pattern))
    records = max(whole + by_hand, DISK_PER_EXAMPLE * sum(size for _, size in task.editions[0].sizes))
    return Need(task.tfds_name, max(0, whole - there), (DISK_PER_DOWNLOAD - 1) * whole + records - there)


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


def _check_disk(place: Path, needs: Sequence[Need], say: Callable[[str], None]) -> None:
    existing = next(p for p in (place, *place.absolute().parents) if p.exists())
    free, needed = shutil.disk_usage(existing).free, sum(need.disk for need in needs)
    sizes = ", ".join(f"{need.name} {need.download / GB:.2f} GB" for need in needs)
    summary = f"to download: {sizes}; disk needed about {needed / GB:.1f} GB, free {free / GB:.1f} GB in {place}"
    if free < needed:
        raise OSError(f"too little disk space. {summary}. Give another data_dir, or fewer tasks at a time")
    say(summary)


def _prepare(tfds: Any, builder: Any, task: Task, place: Path, manual: Path, say: Callable[[str], None]) -> None:
    dataset = place / task.tfds_name
    dataset.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(place / "prepare.lock", timeout=0):
            _clear_leftovers(place, dataset)
            say(f"{task.tfds_name}: preparing in {dataset}")
            settings = tfds.download.DownloadConfig(manual_dir=manual if task.manual else None)
            try:
                builder.download_and_prepare(download_config=settings)
            except Exception as error:  # TFDS's downloader, unpacker and builders raise errors of every kind
                if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):  # as the unpacker wraps it
                    raise KeyboardInterrupt from error
                raise OSError(
                    f"{task.tfds_name} could not be downloaded and prepared ({type(error).__name__}: {error}). "
                    "Completed downloads are kept: run the same command again, or put the file into "
                    f"{place / 'downloads'} as TFDS names it; the dataset's home is {task.url}"
                ) from error
    except Timeout:
        raise OSError(f"another process is preparing datasets in {place}: wait for it to end") from None
    for split in SPLITS:
        source.load(task, split, place)
    say(f"{task.tfds_name}: ready, {source.find(task, place)}")


def _clear_leftovers(place: Path, dataset: Path) -> None:
    """Delete what interrupted preparations have left: TFDS uses new names for files and folders every time."""
    downloads = place / "downloads"
    for rest in (*dataset.glob("incomplete.*"), *downloads.glob("*.tmp.*"), *downloads.glob("extracted/*incomplete*")):
        if rest.is_dir():
            shutil.rmtree(rest)
        else:
            rest.unlink()
