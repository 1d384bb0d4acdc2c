"""ABM-LoRA for the language models of transformers: T5, and LLaMA with its relatives. No timm is loaded."""

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
    register_backbone,
    save_adapter,
)
from nlp_ext.batches import answer_tokens
from nlp_ext.llama import LLAMA
from nlp_ext.t5 import T5

register_backbone(LLAMA)
register_backbone(T5)

__all__ = [
    "LLAMA",
    "T5",
    "ABMConfig",
    "AlignConfig",
    "add_lora",
    "answer_tokens",
    "check_adapters",
    "information_loss",
    "initialize_lora",
    "initialize_lora_abm_weights",
    "initialize_lora_aligned_weights",
    "load_adapter",
    "save_adapter",
]
