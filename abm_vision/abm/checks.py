"""The proof that every adapter of a model takes part: one backward pass reaches its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.batches import batch_size, explained, to_device
from abm_vision.abm.hooks import ForwardFn, hooked
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.names import plain_name
from abm_vision.abm.restore import evaluate, restored, seeded, values_restored


def check_adapters(model: nn.Module, batch: Any, *, backbone: Backbone | None = None) -> None:
    """Prove by one forward and backward pass that every adapter of the active set takes part.

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
    layers = {f"{name} ({adapter.name})": layer for adapter in adapters for name, layer in adapter.layers.items()}
    trained = {
        f"{name} ({adapter.name})": factors
        for adapter in adapters
        for name, layer in adapter.layers.items()
        if (factors := _trained_factors(layer, adapter.name))  # a frozen adapter gets no gradient
    }
    if not trained:
        raise ValueError("every adapter is frozen: load it with is_trainable=True, or thaw it")
    called: set[str] = set()
    with hooked(layers, before=lambda label, _: called.add(label)):
        silent = _without_gradient(model, forward_fn, batch, trained)
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(trained)} adapters received no gradient: {', '.join(silent)}. "
            f"{_why(model, called.issuperset(silent))}; or leave them out of targets."
        )


def _trained_factors(layer: LoraLayer, adapter_name: str) -> list[nn.Parameter]:
    tables = layer.lora_A, layer.lora_B
    return [p for table in tables for p in table[adapter_name].parameters() if p.requires_grad]


def _without_gradient(
    model: nn.Module, forward_fn: ForwardFn, batch: Any, trained: Mapping[str, list[nn.Parameter]]
) -> list[str]:
    """Run one backward pass and name the adapters that it does not reach."""
    fitted = {id(p) for parameters in trained.values() for p in parameters}
    heads = [p for p in model.parameters() if p.requires_grad and id(p) not in fitted]
    with seeded(0), restored(model), values_restored(heads), torch.enable_grad():
        evaluate(model)  # stochastic depth would skip blocks, batch norm would count the batch
        for parameter in model.parameters():
            parameter.grad = None
        with torch.no_grad():
            for head in heads:  # one that starts at zero passes nothing back until it has moved
                head.add_(torch.randn_like(head), alpha=0.02)
        outputs = [t.float() for t in _tensors(forward_fn(model, batch)) if t.requires_grad]
        if outputs:  # a plain sum is blind behind a normalisation, so weigh them at random
            sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
        return [label for label, parameters in trained.items() if not any(_is_reached(p) for p in parameters)]


def _is_reached(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool((parameter.grad != 0).any())


def _why(model: nn.Module, all_called: bool) -> str:
    if not all_called:
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
