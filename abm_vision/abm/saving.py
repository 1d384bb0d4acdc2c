"""Saving adapters: stock peft's files, and `abm.json` beside them."""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor

from abm_vision.abm.adapter import Adapter, adapted_layers, check_base, check_some_adapter
from abm_vision.abm.base_change import base_changes, lora_layers
from abm_vision.abm.files import write_json, writing
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.names import plain_name

ABM_FILE, FORMAT = "abm.json", 1
PEFT_PREFIX = "base_model.model."  # of every tensor in an adapter's file


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> None:
    """`model.save_pretrained` (stock peft's files), and beside them `abm.json` with what peft has no word for.

    An adapter that `initialize_lora` started by changing the base weights (PiSSA and others) is written as a plain
    one of twice the rank, for the untouched base. Compiled parts are saved under the names that they had before.

    Args:
        model: the adapted model.
        directory: made if it does not exist.
        state_dict: what the model cannot give by itself, as in peft: the parameters of a sharded one (FSDP), whole.
        settings: JSON values to keep in the active adapter's `abm.json`, such as `report=report.to_dict()`.

    Raises:
        ValueError: the model has no LoRA adapter, or one that a loader would not find: a module that belongs to it was
            replaced or wrapped, or its values are not there (meta device) or not finite.
        CannotWrite: an `OSError`: the disk is full or read-only.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is no PeftModel: pass what add_lora or load_adapter returned")
    check_some_adapter(model)
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings {', '.join(settings)} cannot be written as JSON: {error}") from None
    with _uncompiled(model), as_plain_lora(model, state_dict) as state:
        for name in model.peft_config:
            check_base(model, "an adapter beside it is of no use on the unchanged base", but=name)
            _check_loadable(Adapter(model, name), state)
        with writing(Path(directory)):
            model.save_pretrained(str(directory), state_dict=state)
        blocks = {
            name: [n for n, layer in adapted_layers(model, name).items() if _is_block(layer, n, name, state)]
            for name in model.peft_config
        }
    for name, modules in blocks.items():  # peft puts every adapter but "default" into a folder of its own
        folder = Path(directory) if name == "default" else Path(directory) / name
        active = name in model.active_adapters
        write_json(folder / ABM_FILE, {"format": FORMAT, "qv_only": modules, **(settings if active else {})})


def _is_block(layer: LoraLayer, name: str, adapter_name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a saved B is for q and v alone: peft's hotswap may have put a whole one into the layer."""
    b = layer.lora_B[adapter_name]
    if not isinstance(b, BlockLinear):
        return False
    saved = state[f"{PEFT_PREFIX}{name}.lora_B.{adapter_name}.weight"]
    return not saved.masked_fill(b.mask.to(saved.device), 0).any()


@contextmanager
def _uncompiled(model: PeftModel) -> Iterator[None]:
    """Take off the wrappers of `torch.compile`, which are in the names of modules and tensors."""
    compiled = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]
    for parent, name, child in compiled:
        parent._modules[name] = child._orig_mod
    try:
        yield
    finally:
        for parent, name, child in compiled:
            parent._modules[name] = child


def _check_loadable(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless whoever loads the adapter's tensors finds all of it."""
    for name, layer in adapter.layers.items():
        rank, alpha = layer.r[adapter.name], layer.lora_alpha[adapter.name]
        scaling = alpha / (math.sqrt(rank) if layer.use_rslora[adapter.name] else rank)
        if not math.isclose(float(layer.scaling[adapter.name]), scaling, rel_tol=1e-6):
            raise ValueError(
                f"the scaling of {name} is {float(layer.scaling[adapter.name]):g}, and a loader would find "
                f"{scaling:g}: set it back (unscale_layer), or multiply B by it, before saving"
            )
        by_parameter = adapter.config.target_parameters or not adapter.config.target_modules
        if not by_parameter and not check_target_module_exists(adapter.config, name):
            raise ValueError(
                f"{name} is not among the target modules of adapter {adapter.name!r}: something was wrapped around the "
                "model's modules after LoRA was added (DataParallel?); take it off before saving"
            )
    for name, tensor in state.items():
        if ".lora_" not in name or not re.search(rf"\.{re.escape(adapter.name)}(\.|$)", name):
            continue
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device and has no values: load the adapter first")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is NaN or infinite, the training diverged: there is nothing to save")


# ----------------------------------------------------------- initialisations that were taken out of the base weights


@contextmanager
def as_plain_lora(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """The state that `model.save_pretrained(..., state_dict=...)` is to write; the configurations fit it meanwhile.

    PiSSA, OLoRA, CorDA and LoRA-GA begin with B0 A0 non-zero and subtract s B0 A0 from the base weight. The trained
    layer computes (W0 - s B0 A0) + s B A = W0 + s [B | -B0] [A ; A0]: a plain adapter of twice the rank. peft's
    `path_initial_model_for_weight_conversion` uses the same identity, but leaves out the head (peft 0.21) and needs
    A0 and B0 in a folder; here they are kept with the model (`base_changes`). All other adapters are as they are.
    `state_dict` takes the place of the model's own.
    """
    state = {plain_name(k): v for k, v in (_state(model) if state_dict is None else state_dict).items()}
    configs = dict(model.peft_config)
    for name, layer in lora_layers(model):
        for adapter, (start_a, start_b) in base_changes(layer).items():
            if adapter in configs and adapter in layer.lora_A:
                a, b = (f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB")
                state[a] = torch.cat([state[a], start_a.to(state[a])], 0)
                state[b] = torch.cat([state[b], -start_b.to(state[b])], 1)
                model.peft_config[adapter] = _twice_the_rank(configs[adapter])
    try:
        yield state
    finally:
        model.peft_config.update(configs)


def _state(model: PeftModel) -> Mapping[str, Tensor]:
    """The model's state dict; of an offloaded one with the values that lie elsewhere."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


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
