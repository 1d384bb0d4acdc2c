"""Settings: everything that decides a run's result, flat, checked and hashed. No torch is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, TypeVar

from abm_vision.abm.arguments import KINDS, are, check_choice, nearest
from abm_vision.abm.settings import InitConfig, flag
from abm_vision.initializers import BASELINE, INITIALIZERS, Initializer, Needs, get_initializer, load_plugin
from abm_vision.initializers.record import TYPES, kind_of

LARGEST = 1e6  # of alpha: float32 has room for its products with the factors
PRECISIONS = ("auto", "bf16", "fp32")
PLUGIN, OWN = "plugin", "own"  # fields that are no settings of a run's result, or hold several


@dataclass(frozen=True)
class AdapterSettings:
    """What every harness's configuration has: LoRA, its initialisation, the training's numbers, device and seed.

    A harness adds fields of its own, which are flags of its command line as these are. Settings of an initialisation
    are not among the fields: the row of the chosen one (`abm_vision.initializers`) has them, `own` holds their values.
    `make` takes all of them by name, and `to_dict` gives them all, flat, as files have them.

    A field's `needs` says which initialisations it is for.
    """

    schema: ClassVar[int | str]
    presets: ClassVar[Mapping[str, Mapping[str, Any]]]

    rank: int = flag(8, "r of every adapted layer")
    alpha: float = flag(8.0, "LoRA scales its update by alpha / rank")
    targets: str = flag(
        "all", f"{', '.join(KINDS)}, or module names with commas between, e.g. attn.qkv,fc1 (timm) or q_proj,v_proj"
    )
    dropout: float = flag(0.0, "LoRA dropout")
    init: str = flag("abm", "; ".join(f"{name}: {row.summary}" for name, row in INITIALIZERS.items()))
    plugin: str | None = flag(None, "module that registers the initialisation, if it is none of this package's")
    own: tuple[tuple[str, Any], ...] = field(default=())
    abm_samples: int = flag(128, "calibration samples, the first of the shuffled training set", needs=Needs.BATCHES)
    abm_reference: str | None = flag(
        None,
        "for init abm_tuned: folder of a tuned adapter, or of its run; none: one is tuned first, by this run with "
        f"init {BASELINE}, and its time is counted",
        needs=Needs.REFERENCE,
    )
    epochs: int = flag(12, "training epochs")
    batch_size: int = flag(64, "samples in a training step")
    lr: float = flag(2e-3, "peak learning rate of AdamW, of all that is trained")
    warmup: float = flag(0.1, "share of the steps in which the learning rate rises")
    weight_decay: float = flag(1e-4, "of AdamW")
    precision: str = flag("auto", "auto: bf16 autocast on hardware that multiplies in bfloat16", choices=PRECISIONS)
    device: str = flag("auto", "auto (CUDA, MPS, CPU), or a torch device")
    seed: int = flag(0, "fixes initialisation, data order and result")

    def __post_init__(self) -> None:
        self._settle_own()
        for name in self.__dataclass_fields__:  # a folder is the same with and without a slash at its end
            if isinstance(value := getattr(self, name), str) and value.endswith("/") and value.strip("/"):
                object.__setattr__(self, name, value.rstrip("/"))
        self._check_values()
        if self.abm_reference is not None and Needs.REFERENCE not in self.initializer.needs:
            others = " or ".join(name for name, row in INITIALIZERS.items() if Needs.REFERENCE in row.needs)
            raise ValueError(f"abm_reference is given, but init {self.init} uses no reference: use init {others}")
        at_least("epochs batch_size rank".split(), self, 1)
        at_least("seed weight_decay".split(), self, 0)
        check_share("dropout", self.dropout)
        check_share("warmup", self.warmup)
        for name in ("lr", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.alpha > LARGEST:
            raise ValueError(f"alpha is {self.alpha}; it must be {LARGEST:g} at most")
        if self.seed >= 2**32:
            raise ValueError(f"seed is {self.seed}; it must be less than 2 ** 32")
        self.init_config()
        self.check()
        if self.device not in ("auto", "cpu"):  # which every machine has
            from abm_vision.runs.device import resolve_device  # loads torch, so it comes last

            resolve_device(self.device)

    def _settle_own(self) -> None:
        """Every setting of the initialisation, in the order of its fields; its plugin, if it is from one."""
        if self.plugin is not None:
            load_plugin(self.plugin)
        row, given = get_initializer(self.init), dict(self.own)
        if foreign := sorted(set(given) - set(row.settings)):
            raise ValueError(f"{are(foreign)} given, but no setting of init {self.init}")
        own = tuple((name, given.get(name, setting.default)) for name, setting in row.settings.items())
        object.__setattr__(self, OWN, own)
        object.__setattr__(self, PLUGIN, row.plugin and (self.plugin or row.plugin))

    def _check_values(self) -> None:
        """Types and choices."""
        settings = self.settings()
        for name, value in self.to_dict().items():
            kind, choices = kind_of(settings[name]), settings[name].metadata.get("choices")
            if not isinstance(value, TYPES[kind]) or (isinstance(value, bool) and kind != "bool"):
                raise ValueError(f"{name} is {value!r}; it must be of type {kind}")
            if value == math.inf:
                raise ValueError(f"{name} is {value}; it must be finite")
            if choices:
                check_choice(name, value, choices)

    def check(self) -> None:
        """Raise a ValueError for a field of a harness's own that is out of its range."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Arrive in another process, where the initialisation's module must be imported, too."""
        if state[PLUGIN] is not None:
            load_plugin(state[PLUGIN])
        self.__dict__.update(state)

    @classmethod
    def make(cls: type[Settings], **settings: Any) -> Settings:
        """A preset's configuration with single settings changed, those of its initialisation among them.

        Settings of other initialisations are passed over.

        Raises:
            ValueError: an unknown setting or a value out of range.
        """
        if settings.get(PLUGIN) is not None:
            load_plugin(settings[PLUGIN])
        known = cls.settings()
        if unknown := sorted(set(settings) - set(known)):
            hint = nearest(unknown[0], known)
            raise ValueError(f"unknown settings {', '.join(unknown)}{hint}; a run has {', '.join(known)}")
        preset = settings.get("preset", "quick")
        check_choice("preset", preset, tuple(cls.presets))
        values = {**cls.presets[preset], **settings}
        own = get_initializer(values.get("init", cls.init)).settings
        return cls(
            **{name: value for name, value in values.items() if name in cls.__dataclass_fields__},
            own=tuple((name, value) for name, value in values.items() if name in own),
        )

    @classmethod
    def settings(cls) -> dict[str, Field[Any]]:
        """Every setting that a run may have: the harness's, and those of all registered initialisations after `init`.

        Raises:
            ValueError: an initialisation has a setting of the harness's name.
        """
        own: dict[str, Field[Any]] = {}
        for row in INITIALIZERS.values():
            if taken := sorted(set(row.settings) & set(cls.__dataclass_fields__)):
                raise ValueError(f"{are(taken)} set in every run: give init {row.name} another prefix")
            own |= row.settings
        found: dict[str, Field[Any]] = {}
        for setting in fields(cls):
            found |= own if setting.name == OWN else {setting.name: setting}
        return found

    @classmethod
    def uses(cls, init: str, setting: str) -> bool:
        """Whether an initialisation has a use for a setting; runs that differ in others alone are the same run."""
        row, plain = get_initializer(init), cls.__dataclass_fields__
        if setting in plain:
            return plain[setting].metadata.get("needs", Needs.NOTHING) in row.needs
        return setting in row.settings or setting not in cls.settings()

    @classmethod
    def check_used(cls, names: Iterable[str], inits: Iterable[str]) -> None:
        """Raise a ValueError if a setting is given that none of the initialisations has a use for."""
        idle = sorted(name for name in names if not any(cls.uses(init, name) for init in inits))
        if idle:
            them = "it" if len(idle) == 1 else "them"
            raise ValueError(f"{are(idle)} given, but init {', '.join(inits)} has no use for {them}: leave {them} out")

    @classmethod
    def shared(cls) -> set[str]:
        """The settings that have to do with no initialisation: every run uses them."""
        return {name for name in cls.plain() if "needs" not in cls.__dataclass_fields__[name].metadata}

    @classmethod
    def plain(cls) -> set[str]:
        """The harness's own settings, which every run has, used or not."""
        return {f.name for f in fields(cls)} - {PLUGIN, OWN}

    @property
    def subject(self) -> str:
        """What a run of this harness is about, in a word: its task."""
        raise NotImplementedError

    @property
    def initializer(self) -> Initializer:
        """The row of the initialisation."""
        return get_initializer(self.init)

    def init_config(self) -> InitConfig:
        """The initialisation's settings, as `initialize_lora` takes them.

        Raises:
            ValueError: one is out of its range.
        """
        try:
            return self.initializer.configure(dict(self.own), samples=self.abm_samples, seed=self.seed)
        except ValueError as error:
            raise ValueError(f"init {self.init}: {error}") from None

    def lora_targets(self) -> str | list[str]:
        """What `add_lora` takes as `targets`."""
        return self.targets if self.targets in KINDS else self.targets.split(",")

    def to_dict(self) -> dict[str, Any]:
        """Every setting, flat, as `make` takes them and `config.json` has them; `plugin` only where there is one."""
        found: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            found |= dict(self.own) if name == OWN else {name: getattr(self, name)}
        return {name: value for name, value in found.items() if name != PLUGIN or value is not None}

    def used(self) -> dict[str, Any]:
        """The settings that decide this run: without those that its initialisation has no use for.

        Where its plugin lies is none of them: what is in it is part of the run's content.
        """
        values = self.to_dict().items()
        return {name: value for name, value in values if name != PLUGIN and self.uses(self.init, name)}

    def run_name(self) -> str:
        """Name of the run's folder: runs of different settings never share one."""
        digest = hashlib.sha256(json.dumps(self.used(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.subject}-{self.init}-seed{self.seed}-{digest}"


Settings = TypeVar("Settings", bound=AdapterSettings)


def at_least(names: Iterable[str], config: AdapterSettings, low: int) -> None:
    """Raise a ValueError if one of these fields is lower (or not a number)."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name} is {getattr(config, name)}; it must be {low} or more")


def check_share(name: str, value: float) -> None:
    """Raise a ValueError if a share of what is dropped is outside [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1)")


def without_own_settings(config: Settings) -> Settings:
    """The same run with peft's default initialisation; settings that it does not use are the defaults."""
    kept = {name: value for name, value in config.used().items() if config.uses(BASELINE, name)}
    return config.make(**{**kept, "init": BASELINE})
