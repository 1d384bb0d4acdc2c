"""Forward hooks: one way to put them on modules, and to record what goes into activation modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

ForwardFn = Callable[[nn.Module, Any], Any]
TokenMaskFn = Callable[[Any, str], Tensor | None]


Args = tuple[Any, ...]  # the positional arguments of a module's call; its input comes first


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module],
    before: Callable[[str, Args], Args | None] | None = None,
    after: Callable[[str, Args, Any], None] | None = None,
) -> Iterator[None]:
    """Call `before(name, args)` and `after(name, args, output)` around every call of the modules, for a while.

    What `before` returns, if anything, takes the place of the arguments.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            if before:
                hook = module.register_forward_pre_hook(lambda _, args, name=name: before(name, args))
                stack.callback(hook.remove)
            if after:
                hook = module.register_forward_hook(lambda _, args, output, name=name: after(name, args, output))
                stack.callback(hook.remove)
        yield


class _AllRecorded(Exception):
    """Ends a forward pass whose remaining layers nobody needs."""


def _saved_tensors_are_hooked() -> bool:
    """Whether this is inside a checkpointed block, whose bookkeeping an exception would leave half done."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("they are on"):
            return False
    except RuntimeError:
        return True


@contextmanager
def record_preactivations(
    model: nn.Module, names: Sequence[str], stop_when_complete: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Collect the inputs of the named activation modules while forward passes run.

    The dictionary is filled in the order in which the modules fire; a module that fires again (a recomputation
    by gradient checkpointing) keeps its first value. Tensors are the graph's own: gradients flow through them.

    Args:
        model: a bare module; the names are its own.
        names: activation modules.
        stop_when_complete: the forward pass ends when the last of the modules is reached, unless that is inside a
            checkpointed block; the code in the `with` block after the call of the model is then skipped.

    Yields:
        name to pre-activation z, (batch, ..., hidden), in the model's dtype.
    """
    recorded: dict[str, Tensor] = {}
    modules = {name: model.get_submodule(name) for name in names}

    def record(name: str, args: Args) -> None:
        z = args[0]
        # An in-place activation would overwrite what was recorded.
        recorded.setdefault(name, z.clone() if getattr(modules[name], "inplace", False) else z)
        if stop_when_complete and len(recorded) == len(modules) and not _saved_tensors_are_hooked():
            raise _AllRecorded

    with hooked(modules, before=record), suppress(_AllRecorded):
        yield recorded


def preactivations(model: nn.Module, batch: Any, names: Sequence[str], forward_fn: ForwardFn) -> dict[str, Tensor]:
    """One forward pass of `model` on `batch`, and the pre-activations of the named modules in firing order.

    Nothing above the last of them runs.

    Raises:
        ValueError: a named module was not called.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Autocast keeps its casts of trained weights for as long as it lasts. They would outlive an optimiser step, and
    # those made without gradient would cut the graph.
    torch.clear_autocast_cache()
    with record_preactivations(bare, names, stop_when_complete=True) as recorded:
        forward_fn(model, batch)
    silent = [n for n in names if n not in recorded]
    if silent:
        raise ValueError(
            f"These boundaries never fired: {', '.join(silent)}. The model's forward pass does not call them; "
            "leave them out with ABMConfig(layers=[...]), or pass a forward_fn that runs the blocks they are in."
        )
    return recorded
