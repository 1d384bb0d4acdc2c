"""What an initialisation took out of the base weights: kept with the layer, and in state dicts.

PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ set W0 to W0 - s B0 A0, so that the model's output stays where it was. Whoever
saves the adapter for the pretrained weights needs A0 and B0 (`saving.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

# Initialisations of peft that move a part of the base weights into the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
_TAKEN = re.compile(r"start_A_(?P<adapter>.+)")
ROUNDING = 1e-6  # of the sum of absolute weights: what merging and unmerging may have moved their sum


def changes_base(config: LoraConfig) -> bool:
    """Whether an adapter of this configuration was taken out of the base weights."""
    return str(config.init_lora_weights).lower().startswith(CHANGES_BASE)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))


def remember_base_change(layer: LoraLayer, adapter_name: str) -> None:
    """Keep A0 and B0 with the layer whose base weight has lost s B0 A0: buffers that move with it.

    `keep_base_changes` puts them into the model's `state_dict`: whoever restores base weights without them would save
    an adapter for the wrong base. The base layer itself keeps a mark, which outlives `unload()`.
    """
    for factor, module in (("A", layer.lora_A), ("B", layer.lora_B)):
        layer.register_buffer(f"start_{factor}_{adapter_name}", module[adapter_name].weight.detach().clone(), False)
    base = layer.get_base_layer()
    base.changed_by = adapter_name, base.weight.detach().double().sum().item()


def is_still_changed(module: nn.Module) -> bool:
    """Whether a base layer still has what is left of its weight: merging puts something back."""
    if not hasattr(module, "changed_by"):
        return False
    weight = module.weight.detach().double()
    return abs(weight.sum().item() - module.changed_by[1]) <= ROUNDING * weight.abs().sum().item()


def base_changes(layer: LoraLayer) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapter to the A0 and B0 that it has taken out of a layer's base weight."""
    names = [match["adapter"] for name in layer._buffers if (match := _TAKEN.fullmatch(name))]
    return {name: (layer._buffers[f"start_A_{name}"], layer._buffers[f"start_B_{name}"]) for name in names}


def keep_base_changes(bare: nn.Module) -> None:
    """Make `state_dict()` and `load_state_dict()` of a bare model carry what was taken out of its base weights."""
    if _add_base_changes not in bare._state_dict_hooks.values():
        bare.register_state_dict_post_hook(_add_base_changes)
        bare.register_load_state_dict_pre_hook(_load_base_changes)


def _kept(prefix: str, layer_name: str, layer: LoraLayer) -> dict[str, Tensor]:
    """What was taken out of a base weight, by its names in a state dict: beside the weight, which peft never saves."""
    changes = base_changes(layer).items()
    return {
        f"{prefix}{layer_name}.base_layer.start_{factor}_{adapter}": value
        for adapter, pair in changes
        for factor, value in zip("AB", pair, strict=True)
    }


def _add_base_changes(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    for name, layer in lora_layers(model):
        state.update({key: value.detach() for key, value in _kept(prefix, name, layer).items()})


def _load_base_changes(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Base weights and what was taken out of them belong together."""
    for name, layer in lora_layers(model):
        if f"{prefix}{name}.base_layer.weight" not in state:  # an adapter alone
            continue
        here = _kept(prefix, name, layer)
        there = {key for key in state if key.startswith(f"{prefix}{name}.base_layer.start_")}
        if there != here.keys():
            raise ValueError(
                f"the base weight of {name} in this state dict "
                f"{'was changed by the initialisation of its adapter' if there else 'is unchanged'}, the model's "
                f"{'was changed' if here else 'is unchanged'}: initialise the adapter as it was there "
                "(initialize_lora), then load the state dict; or load what save_adapter wrote"
            )
        for key, value in here.items():
            value.copy_(state.pop(key))
