"""RunConfig: everything that decides a run's result, flat, checked and hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import vtab_tasks
from abm_vision.abm.align import AlignConfig
from abm_vision.abm.checks import check_choice
from abm_vision.abm.config import FITS, ABMConfig
from abm_vision.abm.lora import KINDS, QKV_MODES
from abm_vision.initializers import INITIALIZERS, get_initializer

SCHEMA = 4
PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("cosine", "constant")
# What is trained on and what is scored.
EVALUATIONS: Mapping[str, tuple[str, str]] = {"test": ("train800val200", "test"), "val": ("train800", "val200")}
SET_BY_SUITE = ("task", "init", "seed", "evaluate")
SOURCES = ("auto", "tfds", "folder", "rendered")


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run. Every field is a flag of the command line; the defaults are the `quick` preset.

    Raises:
        ValueError: a field is out of its range.
    """

    task: str = _flag("dsprites_loc", "VTAB-1K task; `list` shows them")
    preset: str = _flag("quick", "quick (minutes on two CPU cores) or paper (the LoRA recipe of the VTAB-1K papers)")
    model: str = _flag("vit_small_patch14_dinov2.lvd142m", "timm model name")
    weights: str = _flag("auto", "auto (this machine first, then the hub), hub, none (random), or a file")
    image_size: int = _flag(70, "side of the square that images are resized to, in pixels")
    normalisation: str = _flag(
        "model", "of pixels: the model's own, ImageNet's, or none: [0, 1]", choices=("model", "imagenet", "none")
    )
    interpolation: str = _flag(
        "model", "of resized images: the model's own, or another", choices=("model", "bilinear", "bicubic")
    )
    rank: int = _flag(8, "r of every adapted layer")
    alpha: float = _flag(8.0, "LoRA scales its update by alpha / rank")
    targets: str = _flag("all", f"{', '.join(KINDS)}, or module names with commas between, e.g. attn.qkv,fc1")
    qkv: str = _flag("full", "full, or qv: leave k alone inside a fused qkv", choices=QKV_MODES)
    dropout: float = _flag(0.0, "LoRA dropout")
    init: str = _flag("abm", "; ".join(f"{name}: {start.summary}" for name, start in INITIALIZERS.items()))
    abm_margin: float = _flag(0.5, "margin of the boundary loss")
    abm_margin_unit: str = _flag("absolute", "unit of the margin", choices=("absolute", "relative"))
    abm_lr: float = _flag(1e-3, "learning rate of the matching")
    abm_steps: int = _flag(20, "optimiser steps of the matching")
    abm_samples: int = _flag(128, "calibration images, the first of the shuffled training set")
    abm_batch_size: int = _flag(8, "images in a step of the matching")
    abm_layers: str = _flag("all", "all, the number of last layers to match, or activation modules with commas between")
    abm_layer_weights: str = _flag("quadratic", "weight of a layer by its depth", choices=("quadratic", "uniform"))
    abm_fit: str = _flag("end_to_end", "all layers together by AdamW, or each on its own in closed form", choices=FITS)
    abm_reference: str | None = _flag(
        None,
        "for init abm_tuned: folder of a tuned adapter, or of its run; none: one is tuned first, by this run with "
        "init kaiming, and its time is counted",
    )
    align_norm: float = _flag(2.0, "for init abm_aligned: length of the rows of A")
    align_size: float = _flag(0.01, "for init abm_aligned: length of the columns of B, if boundaries allow it")
    align_match: float = _flag(0.99, "for init abm_aligned: least share of hidden units that keep their side")
    evaluate: str = _flag(
        "test",
        "test: train on the 1,000 images and score the test split; val: train on 800 and score the other 200, to "
        "choose settings without the test split",
        choices=tuple(EVALUATIONS),
    )
    epochs: int = _flag(12, "training epochs over the training images")
    batch_size: int = _flag(64, "images in a training step")
    lr: float = _flag(2e-3, "peak learning rate of AdamW, adapter and head alike")
    weight_decay: float = _flag(1e-4, "of AdamW")
    schedule: str = _flag("cosine", "of the learning rate, after the warm-up", choices=SCHEDULES)
    warmup_epochs: float = _flag(1.0, "epochs of linear warm-up")
    drop_path: float = _flag(0.0, "stochastic depth")
    precision: str = _flag("auto", "auto: bf16 autocast on hardware that multiplies in bfloat16", choices=PRECISIONS)
    device: str = _flag("auto", "auto (CUDA, MPS, CPU), or a torch device")
    workers: int = _flag(0, "processes that decode the test images; 0: the main one")
    seed: int = _flag(0, "fixes initialisation, data order and result")
    source: str = _flag("auto", "where the data comes from; auto takes real data where it is found", choices=SOURCES)
    data_dir: str | None = _flag(None, "folder with vtab-1k files or with prepared TFDS data")
    test_images: int = _flag(5000, "most test images, drawn with a fixed seed; 0, or fewer in the split: all")
    eval_epochs: int = _flag(0, "test every so many epochs too, for the curves alone; 0: only after the last")

    def __post_init__(self) -> None:
        self._check_types()
        vtab_tasks.get_task(self.task)
        start = get_initializer(self.init)
        if self.qkv == "qv" and not start.blocks:
            raise ValueError(f"init {self.init} cannot leave k alone inside a fused qkv: use qkv full, or {_blocks()}")
        if self.abm_reference is not None and "reference" not in start.needs:
            raise ValueError(f"abm_reference is given, but init {self.init} uses no reference: use init abm_tuned")
        for name, spec in ((f.name, f.metadata) for f in fields(self)):
            if "choices" in spec:
                check_choice(name, getattr(self, name), spec["choices"])
        check_choice("preset", self.preset, tuple(PRESETS))
        _at_least("epochs batch_size image_size rank abm_batch_size".split(), self, 1)
        _at_least("seed workers test_images eval_epochs weight_decay warmup_epochs".split(), self, 0)
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be less than 2 ** 32")
        self.abm()
        self.align()
        resolve_device(self.device)

    def _check_types(self) -> None:
        for spec in fields(self):
            value, allowed = getattr(self, spec.name), _TYPES[str(spec.type)]
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise ValueError(f"{spec.name} is {value!r}; it must be of type {spec.type}")

    def abm(self) -> ABMConfig:
        """The matching's settings."""
        layers = self.abm_layers
        return ABMConfig(
            margin=self.abm_margin,
            margin_unit=self.abm_margin_unit,
            steps=self.abm_steps,
            learning_rate=self.abm_lr,
            samples=self.abm_samples,
            batch_size=self.abm_batch_size,
            layers=layers if layers == "all" else int(layers) if layers.isdigit() else layers.split(","),
            layer_weights=self.abm_layer_weights,
            fit=self.abm_fit,
            seed=self.seed,
        )

    def align(self) -> AlignConfig:
        """The aligned start's settings; it takes as many images as the matching."""
        return AlignConfig(self.abm_samples, self.align_norm, self.align_size, self.align_match, self.seed)

    def lora_targets(self) -> str | list[str]:
        """What `add_lora` takes as `targets`."""
        return self.targets if self.targets in KINDS else self.targets.split(",")

    def used(self) -> dict[str, Any]:
        """The settings that decide this run: without those that its start has no use for."""
        return {name: value for name, value in asdict(self).items() if uses(self.init, name)}

    def run_name(self) -> str:
        """Name of the run's folder: runs of different settings never share one."""
        digest = hashlib.sha256(json.dumps(self.used(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.task}-{self.init}-seed{self.seed}-{digest}"


def _blocks() -> str:
    return ", ".join(name for name, start in INITIALIZERS.items() if start.blocks)


_TYPES = {"str": str, "int": int, "float": (int, float), "str | None": (str, type(None))}


def _at_least(names: list[str], config: RunConfig, low: int) -> None:
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {low} or more")


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


def uses(init: str, setting: str) -> bool:
    """Whether a start has a use for a setting; runs that differ in others alone are the same run."""
    start = get_initializer(init)
    if setting == "abm_reference":
        return "reference" in start.needs
    if setting == "abm_samples":
        return start.needs != "nothing"
    if setting.startswith("abm_"):
        return init in ("abm", "abm_tuned")
    return init == "abm_aligned" or not setting.startswith("align_")


def check_used(names: Iterable[str], inits: Iterable[str]) -> None:
    """Raise a ValueError if a setting is given that none of the starts has a use for."""
    idle = sorted(name for name in names if not any(uses(init, name) for init in inits))
    if idle:
        raise ValueError(f"{', '.join(idle)} is given, but init {', '.join(inits)} has no use for it: leave it out")


def make_config(**settings: Any) -> RunConfig:
    """A preset's configuration with single fields changed: `make_config(preset="paper", lr=2e-3)`.

    Raises:
        ValueError: an unknown field or a value out of range.
    """
    unknown = sorted(set(settings) - {f.name for f in fields(RunConfig)})
    if unknown:
        raise ValueError(
            f"unknown settings {', '.join(unknown)}; a run has {', '.join(f.name for f in fields(RunConfig))}"
        )
    preset = settings.get("preset", "quick")
    check_choice("preset", preset, tuple(PRESETS))
    return replace(RunConfig(), **{**PRESETS[preset], **settings})


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a JSON file: a run's own `config.json` or `result.json`, or {"schema": 4, "config": {...}}.

    Raises:
        FileNotFoundError, ValueError: no such file, no JSON, or another schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no configuration file {path}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or not isinstance(content.get("config"), dict):
        raise ValueError(
            f"{path} has schema {schema}, this version reads {SCHEMA}: write the settings as flags instead"
        )
    return content["config"]


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA, then MPS, then CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device(available[0])
    full = "cuda:0" if name == "cuda" else name
    if full not in available:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(available)}")
    return torch.device(full)
