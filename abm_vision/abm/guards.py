"""What must hold before a model is matched, and what is given back afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from abm_vision.abm.checks import check_saved_modules, is_compiled, modes_given_back
from abm_vision.abm.conversion import changes_base


def check_ready(model: PeftModel, reference: str | nn.Module, adapter_name: str) -> list[Tensor]:
    """The factors A and B to be fitted, if the model can be matched.

    Raises:
        ValueError: it cannot; the message names what is in the way and how to remove it.
    """
    if not isinstance(model, PeftModel):
        hint = "call torch.compile after the initialisation" if is_compiled(model) else "call add_lora first"
        raise ValueError(f"{type(model).__name__} is no PeftModel: {hint}")
    compiled = next((n or "the model" for n, m in model.named_modules() if is_compiled(m)), None)
    if compiled:
        raise ValueError(
            f"{compiled} is compiled, so hooks would not fire: call torch.compile after the initialisation"
        )
    _check_adapter(model, adapter_name)
    _check_reference(model, reference, adapter_name)
    check_saved_modules(model)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A}
    for name, layer in layers.items():
        if layer.merged:
            raise ValueError(f"{name} is merged into the base weights: call model.unmerge_adapter() first")
    factors = [
        p
        for m in layers.values()
        for f in (m.lora_A, m.lora_B)
        for p in f[adapter_name].parameters()
        if p.requires_grad
    ]
    if not factors:
        raise ValueError(f"adapter {adapter_name!r} is frozen: load it with is_trainable=True")
    return factors


def check_float_base(model: PeftModel, adapter_name: str, what: str) -> None:
    """Raise a ValueError if an adapted layer is quantised, so that its weight cannot be computed with."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A:
            dtype = layer.get_base_layer().weight.dtype
            if not dtype.is_floating_point:
                raise ValueError(
                    f"{what} computes with the base weights, and those of {name} are quantised ({dtype}): take a start "
                    "that runs the model alone, such as abm, abm_aligned or eva"
                )


def check_no_dora(model: PeftModel, adapter_name: str, what: str) -> None:
    """Raise a ValueError if the adapter is DoRA, whose weight is not W0 + s B A."""
    if model.peft_config[adapter_name].use_dora:
        raise ValueError(f"{what} is made for W0 + s B A, which DoRA rescales: use dora=False")


def _check_adapter(model: PeftModel, adapter_name: str) -> None:
    names = ", ".join(map(repr, model.peft_config))
    if adapter_name not in model.peft_config:
        raise ValueError(f"there is no adapter {adapter_name!r}; the model has {names}")
    if not isinstance(model.peft_config[adapter_name], LoraConfig):
        raise ValueError(f"adapter {adapter_name!r} is {model.peft_config[adapter_name].peft_type.value}, not LoRA")
    if list(model.active_adapters) != [adapter_name]:
        raise ValueError(
            f"the active adapters are {model.active_adapters}, but exactly {adapter_name!r} is to be initialised: "
            f"call model.set_adapter({adapter_name!r}) first"
        )


def _check_reference(model: PeftModel, reference: str | nn.Module, adapter_name: str) -> None:
    if isinstance(reference, nn.Module):
        return
    if reference == "pretrained":
        for name, config in model.peft_config.items():
            if changes_base(config):
                raise ValueError(
                    f"adapter {name!r} was started with {config.init_lora_weights!r}, which changes the base weights: "
                    "the model with its adapters off is no longer the pretrained one. Pass reference=<an unchanged "
                    "copy of the model>."
                )
        return
    others = [n for n in model.peft_config if n != adapter_name]
    if reference not in others:
        raise ValueError(f"reference {reference!r} is neither 'pretrained' nor one of the other adapters {others}")


@contextmanager
def given_back(model: PeftModel, adapter_name: str, factors: list[Tensor]) -> Iterator[None]:
    """Restore modes, `requires_grad`, gradients and the active adapter; after an error the factors too."""
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    gradients = [(p, p.grad) for p in factors]
    values = [p.detach().clone() for p in factors]
    try:
        with modes_given_back(model):
            yield
    except BaseException:  # an interrupt too must not leave a half-fitted adapter
        with torch.no_grad():
            for factor, value in zip(factors, values, strict=True):
                factor.copy_(value)
        raise
    finally:
        if list(model.active_adapters) != [adapter_name]:
            model.set_adapter(adapter_name)
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for parameter, grad in gradients:
            parameter.grad = grad


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators (all devices), Python's and NumPy's, and restore them afterwards."""
    python, legacy_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
