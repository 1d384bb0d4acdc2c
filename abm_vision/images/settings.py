"""ImageSettings: what every harness of image classification lets one set."""

from __future__ import annotations

from dataclasses import dataclass

from abm_vision.abm.arguments import QKV_MODES, STEP_MODES
from abm_vision.abm.settings import flag
from abm_vision.initializers import INITIALIZERS, Properties
from abm_vision.runs.settings import AdapterSettings, at_least, check_share

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True)
class _Backbone:
    """The fields that help and listings begin with."""

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
class ImageSettings(AdapterSettings, _Backbone):
    """The settings that runs on images have in common.

    Raises:
        ValueError: a field is out of its range.
    """

    qkv: str = flag("full", "full, or qv: leave k alone inside a fused qkv", choices=QKV_MODES)
    schedule: str = flag("cosine", "of the learning rate, after the warm-up", choices=SCHEDULES)
    drop_path: float = flag(0.0, "stochastic depth")
    step: str = flag("auto", "on CUDA: as one graph, eagerly, or auto: as a graph if that can be", choices=STEP_MODES)
    workers: int = flag(0, "processes that decode images; 0: the main one")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        if self.qkv == "qv" and Properties.BLOCKS not in self.initializer.properties:
            known = ", ".join(name for name, row in INITIALIZERS.items() if Properties.BLOCKS in row.properties)
            raise ValueError(f"init {self.init} cannot leave k alone inside a fused qkv: use qkv full, or {known}")
        at_least(["image_size"], self, 1)
        at_least(["workers"], self, 0)
        check_share("drop_path", self.drop_path)
