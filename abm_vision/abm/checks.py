"""Checks of models: that every adapter takes part, and that nothing is lost in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.abm.record import to_device


def check_choice(field: str, value: object, allowed: Sequence[str], hint: str = "") -> None:
    """Raise a ValueError naming the allowed values unless `value` is one of them."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{field} is {value!r}; allowed are {choices}{', ' + hint if hint else ''}")


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(model)` made it, or `model.compile()` was called."""
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def guard_saved_modules(model: PeftModel) -> PeftModel:
    """Make `state_dict()` (and so every save) fail if a module that is saved with the adapter was replaced.

    timm's `reset_classifier()` puts a bare layer where peft's wrapper was; peft then writes no head at all.
    """
    model.register_state_dict_pre_hook(_check_before_saving)
    return model


def _check_before_saving(model: PeftModel, prefix: str, keep_vars: bool) -> None:
    check_saved_modules(model)


def check_saved_modules(model: PeftModel) -> None:
    """Raise a ValueError if a module of `modules_to_save` is no longer peft's wrapper."""
    bare = model.get_base_model()
    for config in model.peft_config.values():
        for suffix in config.modules_to_save or ():
            # By peft's rule, which lets a suffix of no module pass ("classifier" and "score" of task_type SEQ_CLS).
            hits = [m for n, m in bare.named_modules() if n.endswith(suffix)]
            if hits and not any(isinstance(m, ModulesToSaveWrapper) for m in hits):
                raise ValueError(
                    f"{suffix!r} was replaced after LoRA was added (reset_classifier?): it would neither be saved "
                    "nor loaded. Reset the head first, then call add_lora."
                )


def check_adapters(model: PeftModel, batch: Any, *, backbone: Backbone | None = None) -> None:
    """One forward and backward pass that proves that every adapter of the active set takes part.

    Nothing is left behind: gradients, modes and the random state are as before.

    Args:
        model: the adapted model.
        batch: as the user's loader yields it; it goes through the backbone's `forward_fn`.
        backbone: as in `add_lora`.

    Raises:
        ValueError: adapters received no gradient; the message names layer and adapter. Or a head was replaced.
    """
    backbone = backbone or find_backbone(model)
    check_saved_modules(model)
    batch = to_device(batch, next(model.parameters()).device)
    trainable = {
        f"{name} ({adapter})": [p for p in factors if p.requires_grad]
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
        for adapter, factors in _active_factors(layer).items()
    }
    trainable = {name: factors for name, factors in trainable.items() if factors}  # a frozen adapter gets none
    flat = [p for ps in trainable.values() for p in ps]
    if not flat:
        raise ValueError("no LoRA weight is trainable; load the adapter with is_trainable=True")
    fitted = {id(p) for p in flat}
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in fitted]
    values = [p.detach().clone() for p in heads]
    kept = [(p, p.grad) for p in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.grad = None
        with modes_given_back(model), torch.random.fork_rng(), torch.enable_grad():
            evaluate(model)  # stochastic depth would skip blocks, batch norm would count the batch
            with torch.no_grad():
                for head in heads:  # one that starts at zero passes nothing back until it has moved
                    head.add_(torch.randn_like(head), alpha=0.02)
            output = _first_tensor(backbone.forward_fn(model, batch)).float()
            # A plain sum is blind behind a normalisation, so weigh the outputs at random.
            if output.requires_grad:
                (output * torch.randn_like(output)).sum().backward()
        reached = {id(p) for p in flat if p.grad is not None and bool((p.grad != 0).any())}
    finally:
        with torch.no_grad():
            for head, value in zip(heads, values, strict=True):
                head.copy_(value)
        for parameter, grad in kept:
            parameter.grad = grad
    silent = [n for n, ps in trainable.items() if not any(id(p) in reached for p in ps)]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(trainable)} adapters received no gradient: {', '.join(silent)}. The model's "
            "forward pass does not call them, or frozen weights behind them are zero; leave them out of targets."
        )


def _active_factors(layer: LoraLayer) -> dict[str, list[nn.Parameter]]:
    """A and B of each active adapter."""
    return {
        name: [p for factors in (layer.lora_A, layer.lora_B) for p in factors[name].parameters()]
        for name in layer.active_adapters
        if name in layer.lora_A
    }


@contextmanager
def modes_given_back(model: nn.Module) -> Iterator[None]:
    """Restore training or evaluation mode, module by module."""
    training = [(m, m.training) for m in model.modules()]
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def evaluate(model: nn.Module) -> nn.Module:
    """Evaluation mode, but for layers of bitsandbytes, which have nothing to switch off.

    On some CPUs those repack their weights in evaluation mode for good, and no gradient passes them from then on.
    """
    model.eval()
    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.training = True
    return model


def _first_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return _first_tensor(next(iter(output.values() if isinstance(output, Mapping) else output)))
