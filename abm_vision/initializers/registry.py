"""The table of initialisations, which makes a command's flags, and how to add to it. No torch is loaded."""

from __future__ import annotations

import traceback
from dataclasses import MISSING, is_dataclass
from importlib import import_module

from abm_vision.abm.arguments import nearest
from abm_vision.abm.settings import InitConfig
from abm_vision.initializers.record import TYPES, Initializer, kind_of

BASELINE = "kaiming"  # peft's default, which all others are compared with
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
    if not (is_dataclass(config) and issubclass(config, InitConfig) and config.__dataclass_params__.frozen):
        raise ValueError(f"the config of init {row.name} is {config!r}; it must be a frozen dataclass on InitConfig")
    for name, setting in row.settings.items():
        if setting.default is MISSING:
            raise ValueError(f"{config.__name__}.{setting.name} has no default: a run must be able to leave it out")
        if kind_of(setting) not in TYPES:
            raise ValueError(
                f"{config.__name__}.{setting.name} is of type {kind_of(setting)}; a setting is of type "
                f"{', '.join(TYPES)}, or has flag(..., parse=a function of its text)"
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
