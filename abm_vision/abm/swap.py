"""peft's LoRA layers of any model made ours (`MergedLinear`) in place, and peft's again."""

from __future__ import annotations

import warnings
from collections import defaultdict

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from abm_vision.abm.base_change import lora_layers
from abm_vision.abm.merged_linear import _DROPOUT, _LINEAR, NUMBER, MergedLinear, _is_bare, is_plain


def use_merged_linear(model: nn.Module, enabled: bool = True) -> int:
    """Make the LoRA layers of any model train on the merged weight, in place; `enabled=False` makes them peft's again.

    Only the class of a layer changes: parameters, hooks, names and files stay what they are, so that an optimiser
    made before is still the model's. Outputs and gradients are those of peft's layer up to rounding. Layers added
    later (`add_adapter` with further targets) need a further call.

    Args:
        model: whatever has LoRA layers of peft: a `PeftModel` of any library's model, or a model with
            `model.add_adapter(LoraConfig(...))` as in transformers and diffusers.
        enabled: whether they are to be ours (`MergedLinear`) or peft's (`lora.Linear`).

    Returns:
        The number of layers that this call has changed; 0 for a second one.

    Warns:
        UserWarning: layers were left as they are, since they would run peft's forward in training all the same, or
            cannot be changed: how many, why, and one of them by name for every reason.

    Raises:
        ValueError: the model has no LoRA layer of peft.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is {model!r}; it must be a torch.nn.Module, such as get_peft_model gives")
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError(f"{type(model).__name__} has no LoRA layer: call get_peft_model(model, LoraConfig(...)) first")
    here, there = (PeftLinear, MergedLinear) if enabled else (MergedLinear, PeftLinear)
    changed, left = 0, defaultdict(list)
    for name, layer in layers.items():
        if type(layer) is there or (not enabled and type(layer) is not here):
            continue
        reason = _why_not(layer) if enabled else _why_fixed(layer)
        if reason is None:
            layer.__class__ = there
            changed += 1
        else:
            left[reason].append(name)
    if left:
        counts = "; ".join(f"{len(names)} {reason} (such as {names[0]})" for reason, names in left.items())
        total = sum(map(len, left.values()))
        warnings.warn(f"{total} of {len(layers)} LoRA layers are left as they are: {counts}", stacklevel=2)
    return changed


def _why_fixed(layer: LoraLayer) -> str | None:
    """Why the class of a layer cannot be changed, if it cannot: the replacement calls the old class's forward."""
    return "with a replaced forward" if "forward" in layer.__dict__ else None


def _why_not(layer: LoraLayer) -> str | None:
    """Why a layer would run peft's forward in training all the same, in words that follow a number of layers.

    These are the conditions of `MergedLinear` that last; what comes and goes (adapters off, merged, several active) is
    left to it.
    """
    if type(layer) is not PeftLinear:
        return f"of class {type(layer).__name__}"
    base, adapters = layer.base_layer, list(layer.lora_A)
    if type(base) is not nn.Linear:
        return f"around a {type(base).__module__}.{type(base).__name__}"
    if not is_plain(base.weight):
        return f"with a base weight that is quantised or sharded ({type(base.weight).__name__}, {base.weight.dtype})"
    if base.weight.requires_grad:
        return "with a base weight that is trained"
    if not _is_bare(base, _LINEAR):
        return "with hooks or another forward inside"
    reasons = [_why_not_adapter(layer, adapter) for adapter in adapters] or ["without an adapter"]
    return _why_fixed(layer) or (reasons[0] if all(reasons) else None)


def _why_not_adapter(layer: LoraLayer, adapter: str) -> str | None:
    lora_a, lora_b, dropout = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_dropout[adapter]
    if adapter in layer.lora_variant:
        return f"with {type(layer.lora_variant[adapter]).__name__.removesuffix('LinearVariant')}"
    if isinstance(dropout, nn.Dropout) and dropout.p:
        return "with LoRA dropout"
    if not (_is_bare(lora_a, _LINEAR) and _is_bare(lora_b, _LINEAR) and _is_bare(dropout, _DROPOUT)):
        return "with hooks or another forward inside"
    if lora_a.bias is not None or lora_b.bias is not None:
        return "with a bias in LoRA"
    if not (is_plain(lora_a.weight) and is_plain(lora_b.weight)):
        return "with quantised or sharded factors"
    if not isinstance(layer.scaling[adapter], NUMBER):
        return "with a scaling held as a tensor"
    return None
