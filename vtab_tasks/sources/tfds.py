"""Datasets that tensorflow-datasets (TFDS) has prepared, read without TensorFlow."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtab_tasks.taskdata import TaskData
from vtab_tasks.tasks import Edition, Task


@dataclass(frozen=True, eq=False)
class TfdsItems:
    """Records whose images TFDS leaves encoded.

    Pillow decodes them: TFDS would use OpenCV where it is installed, and would keep an alpha channel or a palette.
    """

    task: Task
    directory: Path
    records: Any
    grey: bool

    def images(self, positions: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        return [self._image(position) for position in positions]

    def labels(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        with _intact(self.directory):
            found = [self.task.label_fn(self.records[int(position)]) for position in positions]
        return np.array(found, dtype=np.int64)

    def encoded(self, positions: NDArray[np.int64]) -> Iterator[bytes]:
        """Yield the image files at these positions as they are stored."""
        for position in positions:
            with _intact(self.directory):
                found = self.records[int(position)]["image"]
            yield found

    def _image(self, position: int) -> NDArray[np.uint8]:
        """uint8 (H, W, 3); grey images are replicated."""
        with _intact(self.directory), Image.open(io.BytesIO(self.records[int(position)]["image"])) as encoded:
            image = np.asarray(encoded.convert("L" if self.grey else "RGB"))
        image = image.reshape(*image.shape[:2], -1)
        if self.task.pixel_scale > 1 and image.max() > 255 // self.task.pixel_scale:
            raise ValueError(
                f"a pixel of {self.task.tfds_name} is {image.max()}, but the official data go up to "
                f"{255 // self.task.pixel_scale}: this is another dataset, prepare the official one"
            )
        return np.broadcast_to(image * np.uint8(self.task.pixel_scale), (*image.shape[:2], 3))


@contextmanager
def _intact(directory: Path) -> Iterator[None]:
    """Turn the many errors that TFDS and its readers raise on damaged files into one message."""
    try:
        yield
    except NotImplementedError:  # raised by TFDS for a file format without random access
        raise
    except Exception as error:
        raise ValueError(
            f"{directory} is damaged ({type(error).__name__}: {' '.join(str(error).split())}): copy it again, or "
            "delete it and prepare the dataset again"
        ) from error


def default_data_dir() -> Path:
    """Return TFDS's default folder: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets"))


def _dataset_dir(task: Task, data_dir: str | os.PathLike[str] | None) -> Path:
    return (default_data_dir() if data_dir is None else Path(data_dir)) / task.tfds_name


def _versions(dataset: Path) -> list[str]:
    """The prepared versions in the dataset's folder, newest first. TFDS writes dataset_info.json last."""
    names = (info.parent.name for info in dataset.glob("*/dataset_info.json"))
    numbered = (name for name in names if re.fullmatch(r"\d+\.\d+\.\d+", name))
    return sorted(numbered, key=lambda name: [int(number) for number in name.split(".")], reverse=True)


def find(task: Task, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """Find the folder of the newest prepared version that VTAB accepts; None if there is none."""
    dataset = _dataset_dir(task, data_dir)
    for name in _versions(dataset):
        if any(fnmatchcase(name, pattern) for pattern in task.tfds_versions):
            return dataset / name
    return None


def load(task: Task, split: str, data_dir: str | os.PathLike[str] | None) -> TaskData:
    """Load a split from prepared TFDS data.

    Raises:
        ValueError: the package is missing, or the data was prepared in a format, or with sizes, that cannot
            be used.
        FileNotFoundError: the dataset, or one of its files, is missing.
    """
    directory = find(task, data_dir)
    if directory is None:
        raise FileNotFoundError(_not_prepared(task, _dataset_dir(task, data_dir)))
    tfds = import_tfds()
    with _intact(directory):
        builder = tfds.builder_from_directory(directory)
    edition = _edition(task, split, builder)
    spec = "+".join(str(part) for part in edition.parts(split))
    features = builder.info.features
    skip = {name: tfds.decode.SkipDecoding() for name, f in features.items() if isinstance(f, tfds.features.Image)}
    try:
        with _intact(directory):
            records = builder.as_data_source(spec, decoders=skip)
    except NotImplementedError as error:
        raise ValueError(
            f"{directory} was prepared as {builder.info.file_format.value}, which only TensorFlow reads: "
            f"{_how_to_prepare(task)}, in another data_dir or after deleting this one"
        ) from error
    items = TfdsItems(task, directory, records, features["image"].shape[-1] == 1)
    description = f"tfds: official {task.tfds_name} {directory.name} in {directory}"
    return TaskData(task, split, "tfds", str(directory), description, items, np.arange(edition.size(split)))


def import_tfds() -> Any:
    """Import TFDS, only when its data is read; it does not import TensorFlow for that.

    Raises:
        ValueError: TFDS or its reader is not installed.
    """
    try:
        import array_record  # noqa: F401  (TFDS imports it when the first record is read)
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise ValueError(f'reading TFDS data needs the package {error.name}: pip install -e ".[tfds]"') from error
    return tensorflow_datasets


def _edition(task: Task, split: str, builder: Any) -> Edition:
    """The edition that was prepared; all files that the split needs must be there."""
    needed = {part.split for part in task.parts(split)}
    found = {name: info.num_examples for name, info in builder.info.splits.items()}
    for edition in task.editions:
        if all(found.get(name) == size for name, size in edition.sizes if name in needed):
            break
    else:
        there = ", ".join(f"{found[name]} in {name!r}" if name in found else f"no {name!r}" for name in sorted(needed))
        official = " or ".join(
            ", ".join(f"{size} in {name!r}" for name, size in sorted(edition.sizes) if name in needed)
            for edition in task.editions
        )
        raise ValueError(
            f"{builder.data_dir} has {there}; the official data have {official}, of which {task.name}/{split} takes "
            f"{' and '.join(map(str, task.parts(split)))}: {_how_to_prepare(task)}"
        )
    for name in needed:
        for path in builder.info.splits[name].filepaths:
            if not path.exists():
                raise FileNotFoundError(f"{path} is missing: copy it, or {_how_to_prepare(task)}")
    return edition


def _how_to_prepare(task: Task) -> str:
    return (
        f"prepare the dataset with `python -m abm_vision.vtab prepare --task {task.name} --data-dir DIR`, or where "
        f'TensorFlow is installed with tfds.builder("{task.tfds_name}", data_dir=..., file_format="array_record")'
        ".download_and_prepare()"
    )


def _not_prepared(task: Task, dataset: Path) -> str:
    others = _versions(dataset)
    found = f"only version {', '.join(others)}" if others else "no prepared version"
    wanted = " or ".join(task.tfds_versions)
    return f"{dataset} holds {found} of {task.tfds_name}, VTAB takes {wanted}: {_how_to_prepare(task)}"
