"""The tasks as rows of data, and the rule that picks each split's items.

Sizes, slices and label bins follow the official VTAB code, github.com/google-research/task_adaptation;
data set names and versions are those of tensorflow-datasets (TFDS).
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vtab_tasks import labels

SPLITS = ("train800", "val200", "train800val200", "test")


@dataclass(frozen=True)
class Part:
    """Items start, ..., stop - 1 of one TFDS split, in TFDS order."""

    split: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        """The slice as TFDS writes it, for example `train[0:800]`."""
        return f"{self.split}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Task:
    """One task of VTAB-1K.

    Attributes:
        name: The task's id, for example `dsprites_loc`.
        group: `natural`, `specialized` or `structured`.
        num_classes: Width of the head; labels are 0, ..., num_classes - 1.
        classes: What a class means, in words.
        folders: Names that the task's folder has in community copies of `vtab-1k`.
        tfds_name: The data set's name in TFDS.
        tfds_version: The TFDS versions that hold the same data, as a pattern such as `2.*.*`.
        image_size: Native (height, width) in pixels.
        pixel_scale: What a stored pixel is multiplied by to fill 0, ..., 255.
        label_fn: Label of one TFDS example, from its features.
        train800: Where the 800 training images are.
        val200: Where the 200 validation images are.
        test: Where the test images are.
        url: Home of the data.
        citation: Whom to cite for it.
    """

    name: str
    group: str
    num_classes: int
    classes: str
    folders: tuple[str, ...]
    tfds_name: str
    tfds_version: str
    image_size: tuple[int, int]
    pixel_scale: int
    label_fn: Callable[[Mapping[str, Any]], int]
    train800: Part
    val200: Part
    test: Part
    url: str
    citation: str

    def parts(self, split: str) -> tuple[Part, ...]:
        """The slices that make up a split, in order.

        Raises:
            ValueError: `split` is none of `SPLITS`.
        """
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
        if split == "train800val200":
            return (self.train800, self.val200)
        return (getattr(self, split),)

    def size(self, split: str) -> int:
        """Number of images in a split."""
        return sum(len(part) for part in self.parts(split))


def _dsprites(name: str, classes: str, label_fn: Callable[[Mapping[str, Any]], int]) -> Task:
    """A dSprites task: 737,280 images cut 80/10/10, of which training and validation take the first few."""
    return Task(
        name=name,
        group="structured",
        num_classes=16,
        classes=classes,
        folders=(name,),
        tfds_name="dsprites",
        tfds_version="2.*.*",
        image_size=(64, 64),
        pixel_scale=255,
        label_fn=label_fn,
        train800=Part("train", 0, 800),
        val200=Part("train", 589_824, 590_024),
        test=Part("train", 663_552, 737_280),
        url="https://github.com/google-deepmind/dsprites-dataset",
        citation="Matthey, Higgins, Hassabis, Lerchner: dSprites - Disentanglement testing Sprites, 2017",
    )


_ROWS = (
    _dsprites("dsprites_loc", "horizontal position in 16 equal bins, from the left", labels.dsprites_loc),
    _dsprites("dsprites_ori", "orientation in 16 bins of 2.5 steps of 2 pi / 39", labels.dsprites_ori),
)

TASKS: dict[str, Task] = {task.name: task for task in _ROWS}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: There is no such task; the message gives the nearest names and all names.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise ValueError(f"unknown task {name!r}{hint} The tasks are: {', '.join(TASKS)}")
