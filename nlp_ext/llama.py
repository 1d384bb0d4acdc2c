"""LLAMA: the `Backbone` of LLaMA and of decoders with the same blocks.

Mistral, Qwen2, Qwen3, Gemma, SmolLM3 and others name and compute their blocks as LLaMA does; Phi-3 fuses q, k and v,
and gate and up. Nothing here imports transformers.
"""

from __future__ import annotations

import re

from torch import nn

from abm_vision.abm.host import Backbone
from nlp_ext import batches

_BLOCK = r"(?:(?:model|transformer)\.)?layers\.\d+"
_ACT = rf"{_BLOCK}\.mlp\.(?:act_fn|activation_fn)"
_HEADS = ("score", "classifier", "qa_outputs")


def _matches(model: nn.Module) -> bool:
    """A model of transformers with attention and one gated MLP in every block (no experts)."""
    if not any(t.__module__.startswith("transformers.models.") for t in type(model).__mro__):
        return False
    names = [name for name, _ in model.named_modules()]

    def count(pattern: str) -> int:
        return sum(re.fullmatch(pattern, name) is not None for name in names)

    gates = count(rf"{_BLOCK}\.mlp\.(?:gate_proj|gate_up_proj)")
    return 0 < count(_BLOCK) == count(rf"{_BLOCK}\.self_attn") == count(_ACT) == gates


def _heads(model: nn.Module) -> list[str]:
    """Heads of classifiers and question answering; `lm_head` stays frozen, and is often tied to the embeddings."""
    return [name for name, _ in model.named_children() if name in _HEADS]


def _fused_qkv(model: nn.Module) -> list[str]:
    """Phi-3's, where q, k and v are of equal size (no grouped queries)."""
    config = model.config
    if config.num_attention_heads != config.num_key_value_heads:
        return []
    return [name for name, _ in model.named_modules() if re.fullmatch(rf"{_BLOCK}\.self_attn\.qkv_proj", name)]


LLAMA = Backbone(
    name="LLaMA",
    matches=_matches,
    target_modules={
        "attention": rf"{_BLOCK}\.self_attn\.(?:[qkvo]_proj|qkv_proj)",
        "mlp": rf"{_BLOCK}\.mlp\.(?:gate_proj|up_proj|gate_up_proj|down_proj)",
    },
    # The input of the activation is that of gate_proj (Phi-3: the first half of gate_up_proj); up_proj is linear.
    boundary_modules={"layers": _ACT},
    key_modules=r".*\.k_proj",
    fused_qkv=_fused_qkv,
    head_modules=_heads,
    forward_fn=batches.forward,
    loss_fn=batches.loss,
    token_mask_fn=batches.real_tokens,
    task_type=lambda model: "CAUSAL_LM" if hasattr(model, "lm_head") else None,
)
