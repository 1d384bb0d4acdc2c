"""Saving an adapter whose start was taken out of the base weights, so that it loads on the untouched ones.

PiSSA, OLoRA, CorDA and LoRA-GA begin with B0 A0 non-zero and subtract s B0 A0 from the base weight. The trained layer
computes (W0 - s B0 A0) + s B A = W0 + s [B | -B0] [A ; A0]: a plain adapter of twice the rank. peft's
`path_initial_model_for_weight_conversion` uses the same identity, but leaves out the head (peft 0.21) and needs the
start in a folder; here the start is kept with the model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

# Starts of peft that move a part of the base weights into the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def changes_base(config: LoraConfig) -> bool:
    """Whether an adapter of this configuration was taken out of the base weights."""
    return str(config.init_lora_weights).lower().startswith(CHANGES_BASE)


def remember_start(layer: LoraLayer, adapter_name: str) -> None:
    """Keep A0 and B0 with the layer: buffers that move with it and are in no file."""
    for factor, module in (("A", layer.lora_A), ("B", layer.lora_B)):
        layer.register_buffer(_buffer(factor, adapter_name), module[adapter_name].weight.detach().clone(), False)


def _buffer(factor: str, adapter_name: str) -> str:
    return f"start_{factor}_{adapter_name}"


@contextmanager
def as_plain_lora(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """The state that `model.save_pretrained(..., state_dict=...)` is to write; the configurations fit it meanwhile.

    Adapters whose start was remembered become plain ones of twice the rank; all others are as they are. `state_dict`
    takes the place of the model's own.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    configs = dict(model.peft_config)
    for name, layer in model.named_modules():
        for adapter in configs:
            start_a = getattr(layer, _buffer("A", adapter), None) if isinstance(layer, LoraLayer) else None
            if start_a is not None:
                start_b = getattr(layer, _buffer("B", adapter))
                a, b = (f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB")
                state[a] = torch.cat([state[a], start_a.to(state[a])], 0)
                state[b] = torch.cat([state[b], -start_b.to(state[b])], 1)
                model.peft_config[adapter] = _twice_the_rank(configs[adapter])
    try:
        yield state
    finally:
        model.peft_config.update(configs)


def _twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The same scaling at rank 2r: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2

    def times(values: dict[str, Any], by: float) -> dict[str, Any]:
        return {key: value * by for key, value in values.items()}

    plain = copy.copy(config)
    plain.init_lora_weights, plain.corda_config, plain.lora_ga_config = True, None, None
    plain.r, plain.rank_pattern = 2 * config.r, times(config.rank_pattern, 2)
    plain.lora_alpha, plain.alpha_pattern = factor * config.lora_alpha, times(config.alpha_pattern, factor)
    return plain
