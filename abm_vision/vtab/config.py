"""RunConfig: the settings of a run of VTAB-1K."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import vtab_tasks
from abm_vision.abm.arguments import QKV_MODES
from abm_vision.abm.settings import flag
from abm_vision.initializers import INITIALIZERS, Properties
from abm_vision.runs.settings import AdapterSettings, at_least, check_share

SCHEMA = 5
SCHEDULES = ("cosine", "constant")
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
        "warmup_epochs": 10.0,
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
    model: str = flag("vit_small_patch14_dinov2.lvd142m", "timm model name")
    weights: str = flag("auto", "auto (this machine first, then the hub), hub, none (random), or a file")
    image_size: int = flag(70, "side of the square that images are resized to, in pixels")
    normalisation: str = flag(
        "model", "of pixels: the model's own, ImageNet's, or none: [0, 1]", choices=("model", "imagenet", "none")
    )
    interpolation: str = flag(
        "model", "of resized images: the model's own, or another", choices=("model", "bilinear", "bicubic")
    )


@dataclass(frozen=True)
class RunConfig(AdapterSettings, _First):
    """The settings of one run. Every field is a flag of the command line; the defaults are the `quick` preset.

    Raises:
        ValueError: a field is out of its range.
    """

    schema: ClassVar[int] = SCHEMA
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    qkv: str = flag("full", "full, or qv: leave k alone inside a fused qkv", choices=QKV_MODES)
    evaluate: str = flag(
        "test",
        "test: train on the 1,000 images and score the test split; val: train on 800 and score the other 200, to "
        "choose settings without the test split",
        choices=tuple(EVALUATIONS),
    )
    schedule: str = flag("cosine", "of the learning rate, after the warm-up", choices=SCHEDULES)
    warmup_epochs: float = flag(1.0, "epochs of linear warm-up")
    drop_path: float = flag(0.0, "stochastic depth")
    workers: int = flag(0, "processes that decode the test images; 0: the main one")
    source: str = flag("auto", "where the data comes from; auto takes real data where it is found", choices=SOURCES)
    data_dir: str | None = flag(None, "folder with vtab-1k files or with prepared TFDS data")
    test_images: int = flag(5000, "most test images, drawn with a fixed seed; 0, or fewer in the split: all")
    eval_epochs: int = flag(0, "test every so many epochs too, for the curves alone; 0: only after the last")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        vtab_tasks.get_task(self.task)
        if self.qkv == "qv" and Properties.BLOCKS not in self.initializer.properties:
            known = ", ".join(name for name, row in INITIALIZERS.items() if Properties.BLOCKS in row.properties)
            raise ValueError(f"init {self.init} cannot leave k alone inside a fused qkv: use qkv full, or {known}")
        at_least(["image_size"], self, 1)
        at_least("workers test_images eval_epochs warmup_epochs".split(), self, 0)
        check_share("drop_path", self.drop_path)
        for name in ("warmup_epochs", "eval_epochs"):
            if getattr(self, name) > self.epochs:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most epochs, which is {self.epochs}")

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
