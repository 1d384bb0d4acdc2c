"""A training step that the host does not hold back: forward and backward pass as one CUDA graph.

A GPU works through the kernels of a step faster than Python launches them: at ViT-B/16, batch 64, half of an eager step
is waiting. A CUDA graph holds all launches of a step and is one launch itself.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from abm_vision.abm.arguments import check_choice
from abm_vision.abm.batches import out_of_memory

MODES = ("auto", "eager", "graph")
GRAPHS = 2  # shapes that are captured: those of whole batches and of the last one
WARM_UP = 3  # eager steps before a capture: libraries choose their kernels in the first ones
LossFn = Callable[[nn.Module, Any], Tensor]


class TrainingStep:
    """Forward and backward pass of a model: `loss = step(batch)`, gradients are in `.grad` as after `loss.backward()`.

    On CUDA the first call with a batch of a shape captures both passes as a CUDA graph; every further one copies the
    batch into the graph's and replays it. The optimiser, clipping and whatever else stands between two calls run as
    before, and an adapter is saved, merged and switched as before. What is only Python runs at the capture alone: a
    `print` in `loss_fn`, say.

        step = TrainingStep(model, loss_fn)
        for batch in loader:
            loss = step(batch)
            optimiser.step()
            optimiser.zero_grad()

    Args:
        model: on its device, in the mode that it is trained in. `torch.compile` of its blocks is welcome.
        loss_fn: (model, batch) to a scalar loss; autocast belongs into it.
        mode: "graph", "eager", or "auto": a graph on CUDA wherever the step can be captured.
        say: receives the reason, in one line, if "auto" runs a step eagerly on CUDA; a warning by default.

    Raises:
        ValueError: an unknown mode, or "graph" for a model that cannot be captured.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, mode: str = "auto", say: Callable[[str], None] = warnings.warn
    ) -> None:
        check_choice("mode", mode, MODES)
        self._model, self._loss_fn, self._mode, self._say = model, loss_fn, mode, say
        self._captured: dict[Hashable, _Captured] = {}
        self._told: set[str] = set()
        if mode == "graph" and (reason := _why_eager(model)):
            raise ValueError(f"the step cannot be captured as a CUDA graph: {reason}; use mode 'auto' or 'eager'")

    def __call__(self, batch: Any) -> Tensor:
        """Run both passes on a batch of any structure: the loss, a scalar without gradient.

        Gradients are added to those that are there.

        Raises:
            ValueError: the model has been changed since its step was captured, or `mode="graph"` and this batch cannot
                be captured.
        """
        if self._mode == "eager" or not self._can_be_captured():
            return self._eager(batch)
        leaves, structure = tree_flatten(batch)
        key = (structure, _autocast(), *map(_shape, leaves))
        if self._captured:
            self._check_unchanged()
        if key not in self._captured:
            if len(self._captured) == GRAPHS:
                return self._without_graph(batch, f"batches have more than {GRAPHS} shapes")
            try:
                self._capture(key, batch)
            except RuntimeError as error:  # of torch, for whatever a graph cannot hold
                if out_of_memory(error):
                    raise
                return self._without_graph(batch, str(error).partition("\n")[0], error)
        return self._captured[key].replay(leaves)

    @property
    def captured(self) -> bool:
        """Whether a step has been captured as a graph."""
        return bool(self._captured)

    def _can_be_captured(self) -> bool:
        reason = None if self._captured else _why_eager(self._model)
        if reason and reason != _NO_CUDA:
            self._tell(reason)
        return reason is None

    def _without_graph(self, batch: Any, reason: str, error: RuntimeError | None = None) -> Tensor:
        if self._mode == "graph":
            message = f"this step cannot be captured as a CUDA graph: {reason}; use mode 'auto' or 'eager'"
            raise ValueError(message) from error
        self._tell(reason)
        if error and not self._captured:
            self._mode = "eager"  # the next attempt would fail as this one did
        return self._eager(batch)

    def _tell(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)
            self._say(f"steps run eagerly, not as a CUDA graph: {reason}")

    def _eager(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        loss.backward()
        return loss.detach()

    def _capture(self, key: Hashable, batch: Any) -> None:
        """Warm up on a stream of its own, and capture; gradients, buffers and random state are as before."""
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        buffers = [(b, b.clone()) for b in self._model.buffers()]
        device = parameters[0].device
        random = torch.cuda.get_rng_state(device)
        inputs = tree_map(_own, batch)
        leaves = tree_flatten(inputs)[0]

        def run() -> Tensor:
            for tensor in (*parameters, *leaves):
                if isinstance(tensor, Tensor):
                    tensor.grad = None
            torch.clear_autocast_cache()  # casts made outside the graph would be those of old weights
            return self._eager(inputs)

        try:
            aside = torch.cuda.Stream(device)
            aside.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(aside):
                for _ in range(WARM_UP):
                    run()
            torch.cuda.current_stream(device).wait_stream(aside)
            snapshot = _Snapshot(self._model)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool()):
                loss = run()
            if changed := snapshot.changed():
                raise RuntimeError(f"{changed} changes with every call")
            gradients = [(p, p.grad) for p in parameters if p.grad is not None]
            self._captured[key] = _Captured(graph, leaves, loss, gradients)
            self._snapshot = snapshot
        finally:
            torch.clear_autocast_cache()
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient
            for buffer, value in buffers:
                buffer.copy_(value)
            torch.cuda.set_rng_state(random, device)

    def _pool(self) -> Any:
        """Graphs that never run side by side share their memory."""
        return next(iter(self._captured.values())).graph.pool() if self._captured else None

    def _check_unchanged(self) -> None:
        if changed := self._snapshot.changed():
            raise ValueError(
                f"the model is not what was captured: {changed} has changed. Put it back (model.train() after an "
                "evaluation, unmerge_adapter() after a merge), or make a new TrainingStep"
            )


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
