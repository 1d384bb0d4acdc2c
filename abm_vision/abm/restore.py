"""What is changed for a while is given back here, and nowhere else."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn

from abm_vision.abm.adapter import Adapter

_HOOKS = tuple(name for name in vars(nn.Module()) if "_hooks" in name)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_SEEDING = threading.RLock()


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give back modes, `requires_grad`, gradients, hooks, running statistics and the active adapters.

    Of modules that are replaced meanwhile, what is new stays.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    modes = [module.training for module in modules]
    flags = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    hooks = [[(name, getattr(module, name).copy()) for name in _HOOKS] for module in modules]
    statistics = [(b, b.clone()) for n, b in model.named_buffers() if n.endswith(_STATISTICS)]
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    named = model.active_adapter if active else None
    try:
        yield
    finally:
        if active and list(model.active_adapters) != active:
            model.base_model.set_adapter(active[0] if len(active) == 1 else active)
            model.active_adapter = named
        for module, mode, kept in zip(modules, modes, hooks, strict=True):
            module.training = mode
            for name, before in kept:
                live = getattr(module, name)
                if live != before:
                    live.clear()
                    live.update(before)
        for parameter, (flag, gradient) in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for buffer, before in statistics:
            buffer.copy_(before)


@contextmanager
def values_restored(tensors: Iterable[Tensor], *, on_error_only: bool = False) -> Iterator[None]:
    """Give back what tensors hold; with `on_error_only` only if something is raised, be it an interrupt."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def put_back() -> None:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)

    try:
        yield
    except BaseException:
        put_back()
        raise
    if not on_error_only:
        put_back()


@contextmanager
def adapter_restored_on_error(adapter: Adapter, *, base: bool) -> Iterator[None]:
    """If anything is raised, give back the adapter: its factors, ranks, dropout and configuration.

    Args:
        adapter: the one that is initialised.
        base: give back the adapted layers' base weights, too: a copy of each is kept meanwhile.
    """
    config, name, layers = adapter.config, adapter.name, list(adapter.layers.values())
    settings = dict(vars(config))
    tables = [getattr(layer, table) for layer in layers for table in (*layer.adapter_layer_names, *_TABLES)]
    entries = [(table, table[name]) for table in tables if name in table]
    absent = [table for table in tables if name not in table]
    bases = [layer.get_base_layer() for layer in layers]
    attributes = [(module, set(vars(module)), set(module._buffers)) for module in (*layers, *bases)]
    weights = [base_layer.weight for base_layer in bases] if base else []
    try:
        with values_restored([*adapter.factors, *weights], on_error_only=True):
            yield
    except BaseException:
        vars(config).update(settings)
        for table, entry in entries:
            table[name] = entry
        for table in absent:
            if name in table:
                del table[name]
        for module, before, buffers in attributes:
            for attribute in set(vars(module)) - before:
                delattr(module, attribute)
            for buffer in set(module._buffers) - buffers:
                del module._buffers[buffer]
        raise


_TABLES = ("r", "lora_alpha", "scaling", "lora_dropout", "use_dora", "use_rslora", "lora_bias", "lora_variant")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators (all devices), Python's and NumPy's, and restore them afterwards.

    They belong to the process, and loaders and decompositions draw from them: of several threads one is in here at a
    time, and the others wait.
    """
    every_gpu = range(torch.cuda.device_count())  # asked for by name: otherwise torch warns where there are several
    with _SEEDING, torch.random.fork_rng(every_gpu):
        python, legacy_numpy = random.getstate(), np.random.get_state()
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy_numpy)


@contextmanager
def initialising(adapter: Adapter, seed: int, *, base: bool = False) -> Iterator[None]:
    """All of the above around an initialisation: only the adapter is another one afterwards."""
    with ExitStack() as stack:
        stack.enter_context(seeded(seed))
        stack.enter_context(restored(adapter.model))
        stack.enter_context(adapter_restored_on_error(adapter, base=base))
        yield


def evaluate(model: nn.Module) -> nn.Module:
    """Evaluation mode, but for layers of bitsandbytes, which have nothing to switch off.

    On some CPUs those repack their weights in evaluation mode for good, and no gradient passes them from then on.
    """
    model.eval()
    for module in model.modules():
        if hasattr(getattr(module, "weight", None), "quant_state"):
            module.training = True
    return model
