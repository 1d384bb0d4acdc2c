"""Every initialisation of a LoRA adapter, peft's and ours: one table, and one verb that applies a row of it.

`record.py` says what an initialisation is, `registry.py` has the table and how to add to it, `peft_own.py` and
`ours.py` a function and a row for each; `verb.py` applies one. No torch is loaded until one is applied.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from abm_vision.abm.settings import InitConfig, flag
from abm_vision.initializers.record import Ingredients, Initializer, Needs, Properties
from abm_vision.initializers.registry import (
    BASELINE,
    INITIALIZERS,
    get_initializer,
    load_plugin,
    register_initializer,
)

if TYPE_CHECKING:
    from abm_vision.initializers.verb import initialize_lora

# The rows, in the order that people see.
import abm_vision.initializers.peft_own  # isort: skip
import abm_vision.initializers.ours  # noqa: F401  isort: skip

__all__ = [
    "BASELINE",
    "INITIALIZERS",
    "Ingredients",
    "InitConfig",
    "Initializer",
    "Needs",
    "Properties",
    "flag",
    "get_initializer",
    "initialize_lora",
    "load_plugin",
    "register_initializer",
]

__getattr__, _, _ = lazy_loader.attach(__name__, submod_attrs={"verb": ["initialize_lora"]})
