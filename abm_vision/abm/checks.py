"""The proof that every adapter of a model takes part: one backward pass reaches its factors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from abm_vision.abm.adapter import Adapter, plain_name
from abm_vision.abm.batches import batch_size, explained, to_device
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.restore import evaluate, restored, seeded, values_restored


def check_adapters(model: nn.Module, batch: Any, *, backbone: Backbone | None = None) -> None:
    """One forward and backward pass that proves that every adapter of the active set takes part.

    Nothing is left behind: gradients, modes and the random state are as before.

    Args:
        model: the adapted model.
        batch: as the user's loader yields it; it goes through the backbone's `forward_fn`. Of several outputs
            (features of every stage, a mapping) all count.
        backbone: as in `add_lora`.

    Raises:
        ValueError: adapters received no gradient; the message names layer and adapter, and says why. Or adapters do
            not run (merged, switched off, compiled ...), or a head was replaced.
    """
    active = list(model.active_adapters) if isinstance(model, PeftModel) else []
    adapters = [Adapter(model, name) for name in active or ["default"]]
    for adapter in adapters:
        adapter.check_runs()
    forward_fn = explained((backbone or find_backbone(model)).forward_fn)
    batch = to_device(batch, adapters[0].device)
    batch_size(batch)  # there are samples
    trainable = {
        f"{name} ({adapter.name})": (layer, [p for p in _factors(layer, adapter.name) if p.requires_grad])
        for adapter in adapters
        for name, layer in adapter.layers.items()
    }
    trainable = {name: found for name, found in trainable.items() if found[1]}  # a frozen adapter gets none
    fitted = {id(p) for _, parameters in trainable.values() for p in parameters}
    if not fitted:
        raise ValueError("every adapter is frozen: load it with is_trainable=True, or thaw it")
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in fitted]
    with seeded(0), restored(model), values_restored(heads), torch.enable_grad(), _called(model) as called:
        evaluate(model)  # stochastic depth would skip blocks, batch norm would count the batch
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for head in heads:  # one that starts at zero passes nothing back until it has moved
                head.add_(torch.randn_like(head), alpha=0.02)
        outputs = [t.float() for t in _tensors(forward_fn(model, batch)) if t.requires_grad]
        if outputs:  # a plain sum is blind behind a normalisation, so weigh them at random
            sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        silent = {n: layer for n, (layer, ps) in trainable.items() if not any(_is_reached(p) for p in ps)}
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(trainable)} adapters received no gradient: {', '.join(silent)}. "
            f"{_why(model, silent.values(), called)}; or leave them out of targets."
        )


def _factors(layer: LoraLayer, adapter_name: str) -> list[nn.Parameter]:
    return [p for table in (layer.lora_A, layer.lora_B) for p in table[adapter_name].parameters()]


def _is_reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


@contextmanager
def _called(model: nn.Module) -> Iterator[set[LoraLayer]]:
    """The adapted layers that a forward pass calls."""
    called: set[LoraLayer] = set()
    with ExitStack() as stack:
        for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
            stack.callback(layer.register_forward_pre_hook(lambda layer, _: called.add(layer)).remove)
        yield called


def _why(model: nn.Module, silent: Iterable[LoraLayer], called: set[LoraLayer]) -> str:
    if any(layer not in called for layer in silent):
        return "The model's forward pass does not call them: pass a batch or a backbone whose forward_fn does"
    zero = [n for n, p in model.named_parameters() if not p.requires_grad and p.numel() and not p.any()]
    scales = [plain_name(n).removeprefix("base_model.model.") for n in zero if not n.endswith("bias")]
    if scales:
        return (
            f"They run, but frozen weights behind them are zero, so that nothing comes back: {', '.join(scales[:4])}"
            f"{f' and {len(scales) - 4} more' if len(scales) > 4 else ''}. Load pretrained weights"
        )
    return "They run, but the model's outputs do not depend on them: pass a forward_fn that returns what does"


def _tensors(output: Any) -> list[Tensor]:
    """Every tensor that a model returned."""
    if not isinstance(output, (Tensor, Mapping, list, tuple)) and hasattr(output, "logits"):
        return [output.logits]
    output = dict(output) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
