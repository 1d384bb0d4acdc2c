"""What an initialisation is, and the table of them. No torch is loaded: a command's flags are made from this table."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from enum import Flag, auto
from importlib import import_module
from typing import TYPE_CHECKING, Any

from abm_vision.abm.arguments import nearest
from abm_vision.abm.settings import InitConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from abm_vision.abm.align import AlignReport
    from abm_vision.abm.gradient import LossFn
    from abm_vision.abm.hooks import ForwardFn
    from abm_vision.abm.host import Backbone
    from abm_vision.abm.report import ABMReport

    Report = ABMReport | AlignReport | None

PACKAGE = __name__.partition(".")[0]
COMMON = frozenset(f.name for f in fields(InitConfig))  # a run has a setting of its own for each
KINDS: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool,
    "str": str,
    "int": int,
    "float": (int, float),
    "str | None": (str, type(None)),
}  # of settings: the annotation to what a value may be


class Needs(Flag):
    """What an initialisation must be given beside the model."""

    NOTHING = 0
    BATCHES = 1
    LABELS = 3  # batches with labels
    REFERENCE = 5  # batches, and an adapter or model whose boundaries are taken

    def __str__(self) -> str:
        batches = "labelled batches" if Needs.LABELS in self else "batches"
        return "nothing" if not self else f"{batches} and a reference" if Needs.REFERENCE in self else batches


class Properties(Flag):
    """What must be known of an initialisation by those who use it.

    CHANGES_BASE: takes what it puts into the adapter out of the base weights; `save_adapter` writes a plain adapter of
        twice the rank for the untouched base. Of all others the file is the adapter itself.
    READS_WEIGHTS: computes with the base weights, so that they must not be quantised.
    BLOCKS: works on an adapter for q and v alone inside a fused qkv, and on other layers than `nn.Linear`.
    BEYOND_FACTORS: ranks, frozen factors or base weights belong to it, too, so that whoever restores a checkpoint of A
        and B must apply it first, and no other adapter may be there.
    """

    NONE = 0
    CHANGES_BASE = auto()
    READS_WEIGHTS = auto()
    BLOCKS = auto()
    BEYOND_FACTORS = auto()


@dataclass(frozen=True)
class Ingredients:
    """What an initialisation may use.

    Args:
        model: fresh from `add_lora`, in evaluation mode or not, as the caller left it.
        adapter_name: the adapter to initialise.
        config: the settings, of the class that the row names.
        batches: calibration batches on the model's device; empty for an initialisation that needs none.
        backbone: the record of the model's family.
        forward_fn: (model, batch) runs the model.
        loss_fn: (model, batch) to the scalar mean loss.
        reference: the name of another adapter, or another model, for an initialisation that needs one.
        progress: show a bar.
    """

    model: PeftModel
    adapter_name: str
    config: Any
    batches: list[Any]
    backbone: Backbone
    forward_fn: ForwardFn
    loss_fn: LossFn
    reference: str | nn.Module | None
    progress: bool

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by their name in the bare model."""
        from abm_vision.abm.adapter import adapted_layers

        return adapted_layers(self.model, self.adapter_name)


@dataclass(frozen=True)
class Initializer:
    """One initialisation: a row of the table.

    Args:
        name: what `init` and `--init` take.
        summary: one line for people.
        source: the paper.
        needs: what `apply` must be given.
        apply: changes the adapter (and base weights, with `CHANGES_BASE`) in place; may return a report.
        properties: what holds of it.
        config: the class of its settings, a frozen dataclass on `InitConfig`. Every field beyond `samples` and `seed`
            is a setting of a run, and a flag.
        prefix: what the names of these begin with: `abm` makes `steps` the setting `abm_steps` and the flag
            `--abm-steps`. The initialisation's name if None.
        version: part of a run's identity, so that a changed initialisation is never answered from an old run. If None,
            a hash of the code: for functions of this package of all that they use, for others of their source files,
            too.
    """

    name: str
    summary: str
    source: str
    needs: Needs
    apply: Callable[[Ingredients], Report]
    properties: Properties = Properties.NONE
    config: type[InitConfig] = InitConfig
    prefix: str | None = None
    version: str | None = None

    @property
    def plugin(self) -> str | None:
        """The module that `apply` is from, None for this package's own."""
        module = self.apply.__module__
        return None if module.partition(".")[0] == PACKAGE else module

    @property
    def settings(self) -> dict[str, Field[Any]]:
        """The settings of a run that are this initialisation's, and the fields of `config` that they are."""
        own = (f for f in fields(self.config) if f.name not in COMMON)
        return {f"{self.prefix or self.name}_{f.metadata.get('name', f.name)}": f for f in own}

    def configure(self, settings: Mapping[str, Any], **common: Any) -> InitConfig:
        """An instance of `config`.

        Args:
            settings: those of a run, by their names there; others than `self.settings` are passed over.
            common: `samples` and `seed`.
        """
        own = {f.name: _parse(f)(settings[name]) for name, f in self.settings.items() if name in settings}
        return self.config(**own, **common)


def _parse(setting: Field[Any]) -> Callable[[Any], Any]:
    return setting.metadata.get("parse", lambda value: value)


def kind_of(setting: Field[Any]) -> str:
    """The annotation of a setting, a key of `KINDS`: that of its flag, if its value is parsed."""
    if "parse" in setting.metadata:
        return "str"
    return setting.type.__name__ if isinstance(setting.type, type) else str(setting.type)


INITIALIZERS: dict[str, Initializer] = {}


def get_initializer(name: str) -> Initializer:
    """The initialisation of that name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if not isinstance(name, str) or name not in INITIALIZERS:
        raise ValueError(f"init is {name!r}; allowed are {', '.join(INITIALIZERS)}{nearest(str(name), INITIALIZERS)}")
    return INITIALIZERS[name]


def register_initializer(row: Initializer) -> None:
    """Add an initialisation to the table: `initialize_lora`, commands and suites then take its name and its settings.

    In a module that Python finds it is there for the commands, too: `--plugin my_module --init mine --mine-strength 2`.

    Raises:
        ValueError: the name is taken, the row does not fit, or one of its settings is another row's.

    Examples:
        Both factors at random, with a strength of its own:

        >>> from dataclasses import dataclass
        >>> import timm, torch
        >>> from abm_vision import INITIALIZERS, Initializer, add_lora, initialize_lora, register_initializer
        >>> from abm_vision.initializers import InitConfig, Needs, flag
        >>> @dataclass(frozen=True)
        ... class NoiseConfig(InitConfig):
        ...     strength: float = flag(0.01, "standard deviation of B")
        ...
        ...     def __post_init__(self):
        ...         super().__post_init__()
        ...         if not self.strength > 0:
        ...             raise ValueError(f"strength is {self.strength}; it must be positive")
        >>> def noise(given):
        ...     with torch.no_grad():
        ...         for layer in given.layers.values():
        ...             layer.lora_B[given.adapter_name].weight.normal_(std=given.config.strength)
        >>> register_initializer(
        ...     Initializer("noise", "B at random", "this docstring", Needs.NOTHING, noise, config=NoiseConfig)
        ... )
        >>> list(INITIALIZERS["noise"].settings)
        ['noise_strength']
        >>> model = add_lora(timm.create_model("test_vit"), rank=4)
        >>> initialize_lora(model, "noise", config=NoiseConfig(strength=2.0))
        >>> b = model.get_base_model().blocks[0].attn.qkv.lora_B["default"].weight
        >>> round(b.std().item())
        2
        >>> del INITIALIZERS["noise"]
    """
    if row.name in INITIALIZERS:
        raise ValueError(f"init {row.name!r} is registered already: choose another name")
    for word in (row.name, row.prefix or row.name):
        if not isinstance(word, str) or not word.isidentifier():
            raise ValueError(f"an initialisation is named {word!r}; letters, digits and underscores make a name")
    _check_settings(row)
    INITIALIZERS[row.name] = row


def _check_settings(row: Initializer) -> None:
    """Raise a ValueError unless every setting of a row can be a flag and is no other row's."""
    config = row.config
    frozen = is_dataclass(config) and issubclass(config, InitConfig) and config.__dataclass_params__.frozen
    if not frozen:
        raise ValueError(f"the config of init {row.name} is {config!r}; it must be a frozen dataclass on InitConfig")
    for name, setting in row.settings.items():
        if setting.default is MISSING:
            raise ValueError(f"{config.__name__}.{setting.name} has no default: a run must be able to leave it out")
        if kind_of(setting) not in KINDS:
            raise ValueError(
                f"{config.__name__}.{setting.name} is of type {kind_of(setting)}; a setting is of type "
                f"{', '.join(KINDS)}, or has flag(..., parse=a function of its text)"
            )
        other = next((r for r in INITIALIZERS.values() if name in r.settings and r.config is not config), None)
        if other:
            raise ValueError(f"{name} is a setting of init {other.name}: give init {row.name} another prefix")


def load_plugin(module: str) -> None:
    """Import a module that registers initialisations.

    Raises:
        ValueError: there is none of that name, or it cannot be imported; the message says why.
    """
    names = isinstance(module, str) and all(part.isidentifier() for part in module.split("."))
    if not names or module.endswith(".py"):
        raise ValueError(f"plugin is {module!r}; give the name of a module, such as my_module, not of a file")
    try:
        import_module(module)
    except ValueError:  # of `register_initializer`
        raise
    except (Exception, SystemExit) as error:  # a module of the user's may raise anything
        raise ValueError(f"plugin is {module!r}: {_why(module, error)}") from error


def _why(module: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return f"no module named {error.name!r}; put its folder on PYTHONPATH, or install it"
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"it cannot be imported: {type(error).__name__}: {error} ({last.filename}, line {last.lineno})"
