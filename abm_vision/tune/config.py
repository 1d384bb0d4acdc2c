"""TuneConfig: the settings of a run on one's own images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from abm_vision.abm.settings import flag
from abm_vision.images.settings import ImageSettings

SCHEMA = "tune-1"
SUBJECT = "images"  # there is one task
AUGMENTATIONS = ("none", "light", "timm")
EVALUATIONS = ("test", "val")
AUTO, SWEPT = "auto", (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # of --lr: a word for the best of these rates


@dataclass(frozen=True)
class _First:
    """The field that help and listings begin with."""

    data: str | None = flag(
        None,
        "folder of FOLDER/CLASS/*, of FOLDER/train|val|test/CLASS/*, a CSV file of path, label (and split), or hf:NAME "
        "(a data set of Hugging Face)",
    )


@dataclass(frozen=True)
class TuneConfig(ImageSettings, _First):
    """The settings of one run on one's own images. Every field is a flag of the command line.

    Raises:
        ValueError: a field is out of its range.
    """

    schema: ClassVar[str] = SCHEMA
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {}}

    image_size: int = flag(112, "side of the square that images are resized to, in pixels")
    batch_size: int = flag(32, "images in a training step")
    validation: float = flag(0.2, "share of every class that is split off for validation where no val part is given")
    augment: str = flag(
        "none",
        "of training images: none (decoded once, kept in memory), light (crops of at least 60 % and mirror images), "
        "timm (its recipe of ImageNet: small crops, RandAugment, random erasing)",
        choices=AUGMENTATIONS,
    )
    evaluate: str = flag(
        "test", "test: score the test part, if there is one; val: leave it closed", choices=EVALUATIONS
    )
    skip_broken: bool = flag(False, "leave out files that cannot be read, and list them; otherwise they are an error")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        super().check()
        if not 0 < self.validation < 1:
            raise ValueError(f"validation is {self.validation}; it must lie between 0 and 1")

    @property
    def subject(self) -> str:
        """What every run is about."""
        return SUBJECT


def make_config(**settings: Any) -> TuneConfig:
    """The defaults with single fields changed: `make_config(data="my/photos", lr=1e-3)`.

    Raises:
        ValueError: an unknown field or a value out of range.
    """
    return TuneConfig.make(**settings)
