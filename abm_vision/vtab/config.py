"""RunConfig: the settings of a run of VTAB-1K."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import vtab_tasks
from abm_vision.abm.settings import flag
from abm_vision.images.settings import ImageSettings
from abm_vision.runs.settings import at_least

SCHEMA = 6
# What is trained on and what is scored.
EVALUATIONS: Mapping[str, tuple[str, str]] = {"test": ("train800val200", "test"), "val": ("train800", "val200")}
HANDFUL = 8  # images that `suite --smoke` trains on and scores
SOURCES = ("auto", "tfds", "folder", "rendered")
# What a preset sets beyond the defaults. `paper` is the LoRA baseline of the VTAB-1K papers (NOAH): one adapter on
# the fused qkv, 100 epochs of AdamW with 10 of warm-up, stochastic depth and LoRA dropout 0.1, the full test set.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {},
    "paper": {
        "model": "vit_base_patch16_224.orig_in21k",
        "image_size": 224,
        "targets": "attn.qkv",
        "dropout": 0.1,
        "epochs": 100,
        "lr": 1e-3,
        "drop_path": 0.1,
        "test_images": 0,
    },
}


@dataclass(frozen=True)
class _First:
    """The fields that help and listings begin with."""

    task: str = flag("dsprites_loc", "VTAB-1K task; `list` shows them")
    preset: str = flag(
        "quick",
        "quick (minutes on two CPU cores) or paper (the LoRA recipe of the VTAB-1K papers)",
        choices=tuple(PRESETS),
    )


@dataclass(frozen=True)
class RunConfig(ImageSettings, _First):
    """The settings of one run. Every field is a flag of the command line; the defaults are the `quick` preset.

    Raises:
        ValueError: a field is out of its range.
    """

    schema: ClassVar[int] = SCHEMA
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    evaluate: str = flag(
        "test",
        "test: train on the 1,000 images and score the test split; val: train on 800 and score the other 200, to "
        "choose settings without the test split",
        choices=tuple(EVALUATIONS),
    )
    source: str = flag("auto", "where the data comes from; auto takes real data where it is found", choices=SOURCES)
    data_dir: str | None = flag(None, "folder with vtab-1k files or with prepared TFDS data")
    test_images: int = flag(5000, "most test images, drawn with a fixed seed; 0, or fewer in the split: all")
    eval_epochs: int = flag(0, "test every so many epochs too, for the curves alone; 0: only after the last")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        vtab_tasks.get_task(self.task)
        super().check()
        at_least("test_images eval_epochs".split(), self, 0)
        if self.eval_epochs > self.epochs:
            raise ValueError(f"eval_epochs is {self.eval_epochs}; it must be at most epochs, which is {self.epochs}")

    @property
    def subject(self) -> str:
        """The task."""
        return self.task


def make_config(**settings: Any) -> RunConfig:
    """A preset's configuration with single fields changed: `make_config(preset="paper", lr=2e-3)`.

    Raises:
        ValueError: an unknown field or a value out of range.
    """
    return RunConfig.make(**settings)
