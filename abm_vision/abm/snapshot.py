"""Whether a step can be captured as a CUDA graph, and whether it still is what was captured."""

from __future__ import annotations

import copy
import dis
import random
from collections.abc import Callable
from functools import cache
from types import CellType, CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.modules.module import _has_any_global_hook

NO_CUDA = "the model is not on a CUDA device"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_SPREAD = (nn.parallel.DistributedDataParallel, nn.DataParallel, FullyShardedDataParallel)
_PLAIN = (bool, int, float, str, bytes, type(None))
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def why_eager(model: nn.Module, loss_fn: Callable[..., Tensor]) -> str | None:
    """Why a model's step cannot be a graph; None if it can, as far as is known before it is tried."""
    devices = {p.device for p in model.parameters()}
    if not devices or any(device.type != "cuda" for device in devices):
        return NO_CUDA
    if len(devices) > 1:
        return "the model lies on several devices"
    if not any(p.requires_grad for p in model.parameters()):
        return "nothing of the model is trained"
    for name, module in model.named_modules():
        where = name or type(module).__name__
        if isinstance(module, _SPREAD):
            return f"gradients are exchanged between devices ({type(module).__name__})"
        if getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing is on"
        if any(getattr(module, hooks) for hooks in _HOOKS) or hasattr(module, "_hf_hook"):
            return f"there is a hook on {where}, which a graph would not call"
        if any(p is not None and _has_hooks(p) for p in module._parameters.values()):
            return f"there is a hook on a parameter of {where}, which a graph would not call"
    if _has_any_global_hook():
        return "there are hooks on all modules, which a graph would not call"
    return generator_of(loss_fn)


def generator_of(loss_fn: Callable[..., Tensor]) -> str | None:
    """Why a loss function with a generator of its own cannot be captured; None if it has none."""
    name = next((name for name, value in _outside(loss_fn).items() if isinstance(value, _GENERATORS)), None)
    return name and f"the loss function draws from {name}, from which a graph would not draw again"


def why_not_copied(leaf: Any, device: torch.device) -> str | None:
    """Why a graph cannot have a batch's leaf anew: it copies tensors, and numbers decide which graph it is."""
    if isinstance(leaf, Tensor):
        if leaf.device != device:
            return f"a batch holds a tensor on {leaf.device}; all must be tensors on {device} or numbers"
        if leaf.requires_grad:
            return "a tensor of the batch asks for a gradient, which would stay in the graph"
    elif not isinstance(leaf, _PLAIN):
        return f"a batch holds a {type(leaf).__name__}; all must be tensors on {device} or numbers"
    return None


def _has_hooks(parameter: Tensor) -> bool:
    return any(getattr(parameter, hooks, None) for hooks in _OF_PARAMETERS)


class Snapshot:
    """What decides which kernels a step runs, and on what memory.

    Attributes, modules, hooks, parameters and buffers of the model; what the loss function names from outside, and if
    that is a module, all of the same. It is asked at every step, so that tables are gone through, and no module is
    looked up.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        self._attributes: list[tuple[str, dict[str, Any], str, Any]] = []  # module, its table, name, value
        self._objects: list[tuple[str, dict[str, Any], str, Any]] = []  # the same of what is compared by identity
        self._tensors: list[tuple[str, dict[str, Any], str, Tensor, tuple[Any, ...]]] = []
        self._sizes: list[tuple[str, dict[str, Any], int]] = []  # of the tables: "forward" may be put into one
        self._loss_fn, outside = loss_fn, _outside(loss_fn)
        self._values = {name: copy.deepcopy(value) for name, value in outside.items() if _is_plain(value)}
        self._things = {name: value for name, value in outside.items() if name not in self._values}
        for root in dict.fromkeys([model, *(value for value in outside.values() if isinstance(value, nn.Module))]):
            for name, module in root.named_modules():
                self._look_at(name or type(module).__name__, module)

    def _look_at(self, where: str, module: nn.Module) -> None:
        table = vars(module)
        self._sizes.append((where, table, len(table)))
        for attribute, value in table.items():
            if attribute in _WATCHED:
                self._attributes.append((where, table, attribute, value.copy() if isinstance(value, dict) else value))
            elif attribute not in _OF_TORCH and _is_plain(value):
                self._attributes.append((where, table, attribute, copy.deepcopy(value)))
            elif attribute not in _OF_TORCH:
                self._objects.append((where, table, attribute, value))
        for held in (module._parameters, module._buffers):
            self._tensors += [(where, held, key, t, _placed(t)) for key, t in held.items() if t is not None]

    def changed(self) -> str | None:
        """What is no longer as it was, if anything: "training of blocks.0"."""
        for where, table, name, value in self._attributes:
            now = table.get(name)
            if type(now) is not type(value) or now != value:  # a tensor now, say, is not to be compared
                return f"{name} of {where}"
        for where, table, name, value in self._objects:
            if table.get(name) is not value:
                return f"{name} of {where}"
        for where, table, key, tensor, placed in self._tensors:
            now = table.get(key)  # a buffer may be another object, as long as it lies where the graph reads it
            if now is None or _placed(now) != placed or (now is not tensor and isinstance(now, nn.Parameter)):
                return f"{key} of {where}"
        for where, table, size in self._sizes:
            if len(table) != size:
                return f"an attribute of {where}"
        outside = _outside(self._loss_fn)
        for name, value in self._values.items():
            if type(now := outside.get(name, _EMPTY)) is not type(value) or now != value:
                return f"{name} of the loss function"
        for name, thing in self._things.items():
            if outside.get(name) is not thing:
                return f"{name} of the loss function"
        return "a hook on all modules" if _has_any_global_hook() else None


_OF_TORCH = frozenset(vars(nn.Module()))
_WATCHED = {"training", "_modules", *_HOOKS}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)


def _placed(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.requires_grad, _has_hooks(tensor)


def _outside(loss_fn: Callable[..., Tensor]) -> dict[str, Any]:
    """What a function names that is not its own: globals of its module, and variables of functions around it."""
    function = getattr(loss_fn, "__func__", loss_fn)
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    around = {name: cell.cell_contents for name, cell in cells if cell != _EMPTY}
    known = function.__globals__
    return {**{name: known[name] for name in _globals_of(code) if name in known}, **around}


_EMPTY = CellType()


@cache
def _globals_of(code: CodeType) -> tuple[str, ...]:
    return tuple({i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"})
