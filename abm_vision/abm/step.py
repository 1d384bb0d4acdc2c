"""A training step that the host does not hold back: forward and backward pass as one CUDA graph.

A GPU works through the kernels of a step faster than Python launches them: at ViT-B/16, batch 64, half of an eager step
is waiting. A CUDA graph holds all launches of a step and is one launch itself.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from abm_vision.abm.arguments import STEP_MODES, check_choice
from abm_vision.abm.batches import BadBatch, out_of_memory

GRAPHS = 2  # shapes that are captured: those of whole batches and of the last one
EAGER = 2  # steps of a shape before it is captured: libraries choose their kernels in the first ones
LossFn = Callable[[nn.Module, Any], Tensor]


class TrainingStep:
    """Forward and backward pass of a model: `loss = step(batch)`, gradients are in `.grad` as after `loss.backward()`.

    On CUDA the first calls with batches of a shape run as they are; then both passes are captured as a CUDA graph, and
    every further call copies its batch into the graph's and replays it. The optimiser, clipping and whatever else
    stands between two calls run as before, and an adapter is saved, merged and switched as before. What is only
    Python runs until the capture alone: a `print` in `loss_fn`, say.

        step = TrainingStep(model, loss_fn)
        for batch in loader:
            loss = step(batch)
            optimiser.step()
            optimiser.zero_grad()

    Args:
        model: on its device, in the mode that it is trained in. `torch.compile` of its blocks is welcome.
        loss_fn: (model, batch) to the loss, a scalar or a tensor whose mean it is; autocast belongs into it.
        mode: "graph", "eager", or "auto": a graph on CUDA wherever the step can be captured.
        say: receives the reason, in one line, if "auto" runs a step eagerly on CUDA; a warning by default.

    Raises:
        ValueError: an unknown mode, or "graph" for a model that cannot be captured.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, mode: str = "auto", say: Callable[[str], None] = warnings.warn
    ) -> None:
        check_choice("mode", mode, STEP_MODES)
        self._model, self._loss_fn, self._mode, self._say = model, loss_fn, mode, say
        self._calls: Counter[Hashable] = Counter()  # of every shape, so far eager
        self._captured: dict[Hashable, _Captured] = {}
        self._said = False
        if mode == "graph" and (reason := _why_eager(model)):
            raise ValueError(_REFUSED.format(reason))

    def __call__(self, batch: Any) -> Tensor:
        """Run both passes on a batch of any structure: what `loss_fn` returned, without gradient.

        Gradients are added to those that are there.

        Raises:
            ValueError: the model has been changed since its step was captured, or `mode="graph"` and this batch cannot
                be captured.
        """
        if self._mode == "auto" and not self._calls and (reason := _why_eager(self._model)):
            self._mode = "eager"
            if reason != _NO_CUDA:
                self._say(_EAGER.format(reason))
        if self._mode == "eager":
            return self._eager(batch)
        leaves, structure = tree_flatten(batch)
        key = (structure, _autocast(), *map(_shape, leaves))
        if self._captured:
            self._check_unchanged()
        if key not in self._captured:
            if len(self._captured) == GRAPHS:
                return self._without_graph(batch, f"batches have more than {GRAPHS} shapes")
            self._calls[key] += 1
            if self._calls[key] <= EAGER:
                return self._eager(batch)
            try:
                self._capture(key, batch)
            except (RuntimeError, BadBatch) as error:  # of torch, for whatever a graph cannot hold
                if out_of_memory(error):
                    raise
                return self._without_graph(batch, str(error).partition("\n")[0], error)
        return self._captured[key].replay(leaves)

    @property
    def captured(self) -> int:
        """How many graphs there are, one for every shape of batches."""
        return len(self._captured)

    def _without_graph(self, batch: Any, reason: str, error: Exception | None = None) -> Tensor:
        if self._mode == "graph":
            raise ValueError(_REFUSED.format(reason)) from error
        if not self._said:
            self._say(_EAGER.format(reason))
            self._said = True
        if error:  # the next attempt would fail as this one did
            self._mode = "eager"
            self._captured.clear()
        return self._eager(batch)

    def _eager(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        loss.mean().backward()
        return loss.detach()

    def _capture(self, key: Hashable, batch: Any) -> None:
        """Try the step on a stream of its own, and capture it; gradients, buffers and random state are as before."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        device = parameters[0].device
        inputs = tree_map(_own, batch)
        leaves = tree_flatten(inputs)[0]

        def run() -> Tensor:
            for tensor in (*parameters, *leaves):
                if isinstance(tensor, Tensor):
                    tensor.grad = None
            torch.clear_autocast_cache()  # casts made outside the graph would be those of old weights
            return self._eager(inputs)

        with _given_back(self._model, parameters, device):
            aside = _aside(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside), _synchronising_is_an_error():
                run()
            torch.cuda.current_stream(device).wait_stream(aside)
            snapshot = _Snapshot(self._model)
            graph = torch.cuda.CUDAGraph()
            # Graphs that never run side by side share their memory.
            pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
            with torch.cuda.graph(graph, pool=pool, stream=aside):
                loss = run()
            if changed := snapshot.changed():
                raise RuntimeError(f"{changed} changes with every call")
            gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._captured[key] = _Captured(graph, leaves, loss, gradients)
        self._snapshot = snapshot

    def _check_unchanged(self) -> None:
        if changed := self._snapshot.changed():
            raise ValueError(
                f"the model is not what was captured: {changed} has changed. Put it back (model.train() after an "
                "evaluation, unmerge_adapter() after a merge), or make a new TrainingStep"
            )


_EAGER = "steps run eagerly, not as a CUDA graph: {}"
_REFUSED = "the step cannot be captured as a CUDA graph: {}; use mode 'auto' or 'eager'"


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: libraries keep a workspace for every stream, tens of MiB, as long as the process."""
    return torch.cuda.Stream(device)


@contextmanager
def _given_back(model: nn.Module, parameters: list[nn.Parameter], device: torch.device) -> Iterator[None]:
    """What a step changes that nobody asked for: gradients, buffers, CUDA's random state."""
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in model.buffers()]
    generator = torch.cuda.default_generators[device.index]
    random = generator.get_state()
    try:
        yield
    except (RuntimeError, BadBatch):
        # After a capture that failed a generator believes that it is still being captured: it gets a new state.
        generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
        raise
    finally:
        torch.clear_autocast_cache()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)
        generator.set_state(random)


@contextmanager
def _synchronising_is_an_error() -> Iterator[None]:
    """While the step is tried: what waits for the GPU (`.item()`, say) cannot be captured, and torch says so."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@dataclass(frozen=True)
class _Captured:
    """A graph of one step, and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Any]
    loss: Tensor
    gradients: list[tuple[nn.Parameter, Tensor]]

    def replay(self, leaves: list[Any]) -> Tensor:
        for own, given in zip(self.inputs, leaves, strict=True):
            if isinstance(own, Tensor):
                own.detach().copy_(given.detach(), non_blocking=True)
        # The graph writes its gradients anew: what is there already, its own of the last step perhaps, is added.
        there = [(own, p.grad.clone()) for p, own in self.gradients if p.grad is not None]
        self.graph.replay()
        for own, gradient in there:
            own.add_(gradient)
        for parameter, own in self.gradients:
            parameter.grad = own
        return self.loss.clone()


# ------------------------------------------------------------------------------------------ what can be captured

_NO_CUDA = "the model is not on a CUDA device"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _why_eager(model: nn.Module) -> str | None:
    """Why a model's step cannot be a graph; None if it can, as far as is known before it is tried."""
    devices = {p.device for p in model.parameters()}
    if not devices or any(device.type != "cuda" for device in devices):
        return _NO_CUDA
    if len(devices) > 1:
        return "the model lies on several devices"
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "gradients are exchanged between processes (DistributedDataParallel)"
    for name, module in model.named_modules():
        if getattr(module, "grad_checkpointing", False) or getattr(module, "gradient_checkpointing", False):
            return "gradient checkpointing is on"
        if any(getattr(module, hooks) for hooks in _HOOKS) or hasattr(module, "_hf_hook"):
            return f"there is a hook on {name or type(module).__name__}, which a graph would not call"
    return None


def _own(leaf: Any) -> Any:
    """A copy of a tensor for the graph to read from."""
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf


def _shape(leaf: Any) -> Hashable:
    """What a graph is made for, of one leaf of a batch."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return type(leaf), leaf if isinstance(leaf, Hashable) else id(leaf)


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


class _Snapshot:
    """What decides which kernels a step runs, and on what memory: plain attributes, modules, hooks and parameters.

    It is asked at every step, so that tables are gone through and no module is looked up.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[str, dict[str, Any], str, Any]] = []  # module, its table, name, value
        self._parameters: list[tuple[str, dict[str, Any], str, tuple[int, bool]]] = []
        for name, module in model.named_modules():
            where = name or type(module).__name__
            for attribute, value in vars(module).items():
                if attribute in _WATCHED or (attribute not in _OF_TORCH and _is_plain(value)):
                    kept = value.copy() if isinstance(value, dict | list) else value
                    self._attributes.append((where, vars(module), attribute, kept))
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    self._parameters.append((where, module._parameters, key, _placed(parameter)))

    def changed(self) -> str | None:
        """What is no longer as it was, if anything: "training of blocks.0"."""
        for where, table, name, value in self._attributes:
            if table.get(name) != value:
                return f"{name} of {where}"
        for where, table, key, placed in self._parameters:
            if table.get(key) is None or _placed(table[key]) != placed:
                return f"{key} of {where}"
        return None


_OF_TORCH = frozenset(vars(nn.Module()))
_WATCHED = {"training", "_modules", *_HOOKS}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, _PLAIN)


_PLAIN = (bool, int, float, str, type(None))


def _placed(parameter: Tensor) -> tuple[int, bool]:
    return parameter.data_ptr(), parameter.requires_grad
