"""ABM-LoRA for the language models of transformers: T5, and LLaMA with its relatives.

Nothing is loaded before it is used (PEP 562), and timm is never loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abm_vision import (
        ABMConfig,
        AlignConfig,
        add_lora,
        check_adapters,
        information_loss,
        initialize_lora,
        initialize_lora_abm_weights,
        initialize_lora_aligned_weights,
        load_adapter,
        save_adapter,
    )
    from nlp_ext import glue, instruct
    from nlp_ext.batches import answer_tokens
    from nlp_ext.llama import LLAMA
    from nlp_ext.t5 import T5

_PACKAGES = ("glue", "instruct")
_HERE = {"LLAMA": "nlp_ext.llama", "T5": "nlp_ext.t5", "answer_tokens": "nlp_ext.batches"}

__all__ = [
    "LLAMA",
    "T5",
    "ABMConfig",
    "AlignConfig",
    "add_lora",
    "answer_tokens",
    "check_adapters",
    "glue",
    "information_loss",
    "initialize_lora",
    "initialize_lora_abm_weights",
    "initialize_lora_aligned_weights",
    "instruct",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_HERE.get(name, "abm_vision")), name)


def __dir__() -> list[str]:
    return __all__
