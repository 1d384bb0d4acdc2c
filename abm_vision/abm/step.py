"""A training step that the host does not hold back: forward and backward pass as one CUDA graph.

A GPU works through the kernels of a step faster than Python launches them (`benchmarks/gpu_step.py`: 10 of 31 to 41 ms
at ViT-S/16, batch 64). A CUDA graph holds all launches of a step and is one launch itself.
"""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from abm_vision.abm.arguments import STEP_MODES, check_choice
from abm_vision.abm.batches import BadBatch
from abm_vision.abm.snapshot import NO_CUDA, Snapshot, why_eager, why_not_copied

CHANGES = 3  # of the model after which it is captured anew
KINDS = 8  # of batches that are waited for until one comes again
GRAPHS = 2  # shapes that are captured: those of whole batches and of the last one
EAGER = 2  # steps of a shape before it is captured: libraries choose their kernels in the first ones
LossFn = Callable[[nn.Module, Any], Tensor]


class TrainingStep:
    """Forward and backward pass of a model: `loss = step(batch)`, gradients are in `.grad` as after `loss.backward()`.

    On CUDA the first calls with batches of a shape run as they are; then both passes are captured as a CUDA graph, and
    every further call copies its batch into the graph's and replays it. The optimiser, clipping and whatever else
    stands between two calls run as before. Gradients are added to those that are there; those of a replay are in the
    same tensors every time, so that whoever keeps one must clone it. What is only Python runs until the capture alone:
    a `print` in `loss_fn`, say.

        step = TrainingStep(model, loss_fn)
        for batch in loader:
            loss = step(batch)
            optimiser.step()
            optimiser.zero_grad()

    Args:
        model: on its device, in the mode that it is trained in. `torch.compile` of its blocks is welcome.
        loss_fn: (model, batch) to the loss, a scalar or a tensor whose mean it is; autocast belongs into it.
        mode: "graph", "eager", or "auto": a graph on CUDA wherever the step can be captured. A model that is no longer
            what was captured (evaluation mode, another active adapter, merged) is captured anew by "auto", and an error
            for "graph".
        say: receives the reason, in one line, if "auto" runs a step eagerly on CUDA; a warning by default.

    Raises:
        ValueError: an unknown mode, or "graph" for a model that cannot be captured.
    """

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, mode: str = "auto", say: Callable[[str], None] = warnings.warn
    ) -> None:
        check_choice("mode", mode, STEP_MODES)
        self._model, self._loss_fn, self._mode, self._say = model, loss_fn, mode, say
        self._calls: Counter[Hashable] = Counter()  # of every kind of batch, so far eager
        self._captured: dict[Hashable, _Captured] = {}
        self._refused: set[Hashable] = set()  # kinds of batches that cannot be captured
        self._said, self._changes = False, 0
        if mode == "graph" and (reason := why_eager(model, loss_fn)):
            raise ValueError(_REFUSED.format(reason))

    def __call__(self, batch: Any) -> Tensor:
        """Run both passes on a batch: nested lists, tuples and dictionaries with tensors on the model's device.

        Returns:
            What `loss_fn` returned, without gradient.

        Raises:
            ValueError: for mode "graph", this batch cannot be captured, or the model is no longer what was captured.
        """
        if self._mode == "auto" and not self._calls and (reason := why_eager(self._model, self._loss_fn)):
            self._mode = "eager"
            if reason != NO_CUDA:
                self._say(_EAGER.format(reason))
        if self._mode == "eager":
            return self._eager(batch)
        leaves, structure = tree_flatten(batch)
        device = next(self._model.parameters()).device
        for leaf in leaves:
            if reason := why_not_copied(leaf, device):
                return self._without_graph(batch, reason)
        key = (structure, _autocast(), *map(_kind, leaves))
        if self._captured and (changed := self._snapshot.changed()):
            self._forget(changed)
            return self._eager(batch)
        if key in self._refused:
            return self._eager(batch)
        if key not in self._captured:
            if len(self._captured) == GRAPHS or len(self._calls) > KINDS:
                return self._without_graph(batch, f"batches are of more than {GRAPHS} kinds (shapes, numbers)")
            self._calls[key] += 1
            if self._calls[key] <= EAGER:
                return self._eager(batch)
            if reason := self._why_not_captured(key, batch):
                self._refused.add(key)
                if not self._captured:  # the next attempt would fail as this one did
                    self._mode = "eager"
                return self._without_graph(batch, reason)
        return self._captured[key].replay(leaves)

    @property
    def captured(self) -> int:
        """How many graphs there are, one for every kind of batch."""
        return len(self._captured)

    def _without_graph(self, batch: Any, reason: str) -> Tensor:
        if self._mode == "graph":
            raise ValueError(_REFUSED.format(reason))
        if not self._said:
            self._say(_EAGER.format(reason))
            self._said = True
        return self._eager(batch)

    def _forget(self, changed: str) -> None:
        """The graphs are no longer the model's."""
        if self._mode == "graph":
            raise ValueError(
                f"the model is not what was captured: {changed} has changed. Put it back (model.train() after an "
                "evaluation, unmerge_adapter() after a merge), or make a new TrainingStep"
            )
        for known in (self._captured, self._calls, self._refused):
            known.clear()
        self._changes += 1
        if self._changes > CHANGES:
            self._mode = "eager"
            self._say(_EAGER.format(f"the model is another one again and again: {changed} has changed"))

    def _eager(self, batch: Any) -> Tensor:
        loss = self._loss_fn(self._model, batch)
        loss.mean().backward()
        return loss.detach()

    def _why_not_captured(self, key: Hashable, batch: Any) -> str | None:
        """Capture a step; the reason if it cannot be. Nothing of the attempt is held in memory afterwards."""
        try:
            self._capture(key, batch)
            return None
        except (RuntimeError, BadBatch) as error:  # of torch, for whatever a graph cannot hold
            reason = str(error).partition("\n")[0]
            if self._mode == "graph":
                raise ValueError(_REFUSED.format(reason)) from error
        torch.cuda.empty_cache()  # the memory that the attempt had for itself
        return reason

    def _capture(self, key: Hashable, batch: Any) -> None:
        """Try the step on a stream of its own, and capture it; gradients, buffers and random state are as before."""
        if reason := why_eager(self._model, self._loss_fn):
            raise RuntimeError(reason)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        device = parameters[0].device
        inputs = tree_map(_own, batch)
        aside = _aside(device)

        def run(backward: Callable[[Tensor], None]) -> Tensor:
            for parameter in parameters:
                parameter.grad = None
            torch.clear_autocast_cache()  # casts made outside the graph would be those of old weights
            loss = self._loss_fn(self._model, inputs)
            backward(loss.mean())
            return loss.detach()

        def tried(loss: Tensor) -> None:
            known = set(map(id, parameters))
            if any(id(leaf) not in known for leaf in _leaves(loss)):
                raise RuntimeError("the loss trains a parameter that is none of the model's")
            loss.backward()

        with _given_back(self._model, parameters, device):
            aside.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(aside), _synchronising_is_an_error():
                    run(tried)
            finally:
                torch.cuda.current_stream(device).wait_stream(aside)
            snapshot, drawn = Snapshot(self._model, self._loss_fn), _host_random()
            graph = torch.cuda.CUDAGraph()
            with _mended(device), torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"):
                loss = run(Tensor.backward)
            if changed := snapshot.changed():
                raise RuntimeError(f"{changed} changes with every call")
            if drawn != _host_random():
                raise RuntimeError("Python, NumPy or torch's CPU generator are drawn from, which a graph would not be")
            gradients = [(p, p.grad) for p in parameters if p.grad is not None]
        self._captured[key] = _Captured(graph, tree_flatten(inputs)[0], loss, gradients)
        self._snapshot = snapshot


_EAGER = "steps run eagerly, not as a CUDA graph: {}"
_REFUSED = "the step cannot be captured as a CUDA graph: {}; use mode 'auto' or 'eager'"


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures: libraries keep a workspace for every stream, as long as the process."""
    return torch.cuda.Stream(device)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors that a backward pass gives gradients to."""
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            yield node.variable
        nodes += [following for following, _ in node.next_functions]


def _host_random() -> tuple[Any, ...]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), str(np.random.get_state())


@contextmanager
def _given_back(model: nn.Module, parameters: list[nn.Parameter], device: torch.device) -> Iterator[None]:
    """What a step changes that nobody asked for: gradients, buffers, random states."""
    gradients = [p.grad for p in parameters]
    buffers = [(b, b.clone()) for b in model.buffers()]
    generator = torch.cuda.default_generators[device.index]
    states = generator.get_state(), torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)
        generator.set_state(states[0])
        torch.set_rng_state(states[1])
        random.setstate(states[2])
        np.random.set_state(states[3])


@contextmanager
def _mended(device: torch.device) -> Iterator[None]:
    """What a capture that fails leaves behind: its stream as the current one, a generator that waits for its end."""
    generator = torch.cuda.default_generators[device.index]
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        try:
            yield
        except (RuntimeError, BadBatch):
            generator.graphsafe_set_state(torch.Generator(device).graphsafe_get_state())
            raise


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
                own.copy_(given, non_blocking=True)
        # The graph writes its gradients anew: what is there already, its own of the last step perhaps, is added.
        there = [(own, p.grad.clone()) for p, own in self.gradients if p.grad is not None]
        self.graph.replay()
        for own, gradient in there:
            own.add_(gradient)
        for parameter, own in self.gradients:
            parameter.grad = own
        return self.loss.clone()


def _own(leaf: Any) -> Any:
    """A copy of a tensor for the graph to read from."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _kind(leaf: Any) -> Hashable:
    """What a graph is made for, of one leaf of a batch."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), leaf)


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
