"""Settings: everything that decides a run's result, flat, checked and hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from abm_vision.abm.arguments import check_choice
from abm_vision.abm.files import read_object
from abm_vision.abm.lora import KINDS
from abm_vision.abm.settings import FITS, ABMConfig, AlignConfig
from abm_vision.initializers import INITIALIZERS, get_initializer
from abm_vision.runs.device import PRECISIONS, resolve_device

LARGEST = 1e6  # of alpha: float32 has room for its products with the factors


def flag(default: Any, text: str, **extra: Any) -> Any:
    """A field of a configuration: its default, its help, and perhaps `choices`."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class AdapterSettings:
    """What every harness's configuration has: LoRA, its start, the training's numbers, device and seed.

    A harness adds fields of its own, which are flags of its command line as these are.
    """

    schema: ClassVar[int | str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    rank: int = flag(8, "r of every adapted layer")
    alpha: float = flag(8.0, "LoRA scales its update by alpha / rank")
    targets: str = flag("all", f"{', '.join(KINDS)}, or module names with commas between, e.g. attn.qkv,fc1")
    dropout: float = flag(0.0, "LoRA dropout")
    init: str = flag("abm", "; ".join(f"{name}: {start.summary}" for name, start in INITIALIZERS.items()))
    abm_margin: float = flag(0.5, "margin of the boundary loss")
    abm_margin_unit: str = flag("absolute", "unit of the margin", choices=("absolute", "relative"))
    abm_lr: float = flag(1e-3, "learning rate of the matching")
    abm_steps: int = flag(20, "optimiser steps of the matching")
    abm_samples: int = flag(128, "calibration samples, the first of the shuffled training set")
    abm_batch_size: int = flag(8, "samples in a step of the matching")
    abm_layers: str = flag("all", "all, the number of last layers to match, or activation modules with commas between")
    abm_layer_weights: str = flag("quadratic", "weight of a layer by its depth", choices=("quadratic", "uniform"))
    abm_fit: str = flag("end_to_end", "all layers together by AdamW, or each on its own in closed form", choices=FITS)
    abm_reference: str | None = flag(
        None,
        "for init abm_tuned: folder of a tuned adapter, or of its run; none: one is tuned first, by this run with "
        "init kaiming, and its time is counted",
    )
    align_norm: float = flag(2.0, "for init abm_aligned: length of the rows of A")
    align_size: float = flag(0.01, "for init abm_aligned: length of the columns of B, if boundaries allow it")
    align_match: float = flag(0.99, "for init abm_aligned: least share of hidden units that keep their side")
    epochs: int = flag(12, "training epochs")
    batch_size: int = flag(64, "samples in a training step")
    lr: float = flag(2e-3, "peak learning rate of AdamW, of all that is trained")
    weight_decay: float = flag(1e-4, "of AdamW")
    precision: str = flag("auto", "auto: bf16 autocast on hardware that multiplies in bfloat16", choices=PRECISIONS)
    device: str = flag("auto", "auto (CUDA, MPS, CPU), or a torch device")
    seed: int = flag(0, "fixes initialisation, data order and result")

    def __post_init__(self) -> None:
        self._check_types()
        start = get_initializer(self.init)
        if self.abm_reference is not None and "reference" not in start.needs:
            raise ValueError(f"abm_reference is given, but init {self.init} uses no reference: use init abm_tuned")
        for name, spec in ((f.name, f.metadata) for f in fields(self)):
            if "choices" in spec:
                check_choice(name, getattr(self, name), spec["choices"])
        at_least("epochs batch_size rank abm_batch_size".split(), self, 1)
        at_least("seed weight_decay".split(), self, 0)
        check_share("dropout", self.dropout)
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.alpha > LARGEST:
            raise ValueError(f"alpha is {self.alpha}; it must be {LARGEST:g} at most")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be less than 2 ** 32")
        self.abm()
        self.align()
        resolve_device(self.device)

    def _check_types(self) -> None:
        for spec in fields(self):
            value, allowed = getattr(self, spec.name), _TYPES[str(spec.type)]
            if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool):
                raise ValueError(f"{spec.name} is {value!r}; it must be of type {spec.type}")
            if value == math.inf:
                raise ValueError(f"{spec.name} is {value}; it must be finite")

    @classmethod
    def make(cls: type[Settings], **settings: Any) -> Settings:
        """A preset's configuration with single fields changed.

        Raises:
            ValueError: an unknown field or a value out of range.
        """
        unknown = sorted(set(settings) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown settings {', '.join(unknown)}; a run has {', '.join(f.name for f in fields(cls))}"
            )
        preset = settings.get("preset", "quick")
        check_choice("preset", preset, tuple(cls.presets))
        return replace(cls(), **{**cls.presets[preset], **settings})

    @property
    def subject(self) -> str:
        """What a run of this harness is about, in a word: its task."""
        raise NotImplementedError

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
        """The aligned start's settings; it takes as many samples as the matching."""
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
        return f"{self.subject}-{self.init}-seed{self.seed}-{digest}"


Settings = TypeVar("Settings", bound=AdapterSettings)
_TYPES = {"bool": bool, "str": str, "int": int, "float": (int, float), "str | None": (str, type(None))}


def at_least(names: Iterable[str], config: AdapterSettings, low: int) -> None:
    """Raise a ValueError if one of these fields is lower (or not a number)."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {low} or more")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError if a share of what is dropped is outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1)")


def uses(init: str, setting: str) -> bool:
    """Whether a start has a use for a setting; runs that differ in others alone are the same run."""
    start = get_initializer(init)
    if setting == "abm_reference":
        return "reference" in start.needs
    if setting in ("abm_samples", "abm_tokens"):  # the aligned start and EVA take them, too
        return start.needs != "nothing"
    if setting.startswith("abm_"):
        return init in ("abm", "abm_tuned")
    return init == "abm_aligned" or not setting.startswith("align_")


def of_initialisation(name: str) -> bool:
    """Whether a setting is an initialisation's own, in which runs may differ that are compared for their initialisation."""
    return name.startswith(("abm_", "align_"))


def check_used(names: Iterable[str], inits: Iterable[str]) -> None:
    """Raise a ValueError if a setting is given that none of the starts has a use for."""
    idle = sorted(name for name in names if not any(uses(init, name) for init in inits))
    if idle:
        raise ValueError(f"{', '.join(idle)} is given, but init {', '.join(inits)} has no use for it: leave it out")


def without_own_settings(config: Settings) -> Settings:
    """The same run with peft's default start; settings that it does not use are the defaults, so that it is shared."""
    unused = {f.name: f.default for f in fields(config) if not uses("kaiming", f.name)}
    return replace(config, init="kaiming", **unused)


def read_config(path: str | Path, schema: int | str) -> dict[str, Any]:
    """The settings in a JSON file: a run's own `config.json` or `result.json`, or {"schema": ..., "config": {...}}.

    Raises:
        FileNotFoundError, ValueError: no such file, no JSON, or another schema.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no configuration file {path}")
    content = read_object(Path(path), "write the settings as flags instead")
    found = content.get("schema")
    if found != schema or not isinstance(content.get("config"), dict):
        raise ValueError(f"{path} has schema {found}, this version reads {schema}: write the settings as flags instead")
    return content["config"]
