"""CUDA graphs on a CPU: the operations of a captured step are recorded, and replayed into the same tensors.

It shows what `TrainingStep` does around a graph. It knows nothing of streams, and of CUDA's memory.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from abm_vision.abm import step
from abm_vision.abm.snapshot import generator_of

WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, found))
        return found


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in WAITS:
            raise RuntimeError("called a synchronizing CUDA operation")
        return function(*args, **(kwargs or {}))


class Graph:
    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, found in self.calls:
            if function.is_view:
                continue
            given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for old, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and _memory(old) not in given:  # in-place operations have done it already
                    old.copy_(new)


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _recorded(graph, **options):
    with Recording() as recording:
        yield
    graph.calls = recording.calls


@contextmanager
def _no_waiting():
    with NoWaiting():
        yield


def emulate(monkeypatch):
    """Let `TrainingStep` take the CPU for a device with graphs."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        CUDAGraph=Graph,
        graph=_recorded,
        current_stream=lambda device=None: stream,
        stream=lambda chosen: nullcontext(),
        default_generators={None: torch.default_generator},
        empty_cache=lambda: None,
    )
    torch_with_graphs = type("Torch", (), {"__getattr__": lambda self, name: getattr(torch, name), "cuda": cuda})()
    monkeypatch.setattr(step, "torch", torch_with_graphs)
    monkeypatch.setattr(step, "why_eager", lambda model, loss_fn: generator_of(loss_fn))
    monkeypatch.setattr(step, "_aside", lambda device: stream)
    monkeypatch.setattr(step, "_mended", lambda device: nullcontext())
    monkeypatch.setattr(step, "_synchronising_is_an_error", _no_waiting)
    # torch's CPU generator is the emulated device's.
    state = lambda: (step.random.getstate(), str(step.np.random.get_state()))  # noqa: E731
    monkeypatch.setattr(step, "_host_random", state)
