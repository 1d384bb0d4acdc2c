"""The full-parameter gradient of every adapted layer, one layer at a time.

For an adapted layer that computes y = W x with W = W0 + s B A, the gradient that full fine-tuning of this one layer
would see is G = dL/dW0 = sum over tokens of g x^T, (out, in), with g = dL/dy. It is formed in the backward pass from
the layer's input and the gradient of its output, handed over, and forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.batches import batch_size, check_finite, explained
from abm_vision.abm.hooks import Args, hooked
from abm_vision.abm.restore import evaluate, restored

LOSS_SCALE = 2.0**12  # in float16, at first
LossFn = Callable[[nn.Module, Any], Tensor]
Receive = Callable[[str, Tensor], None]


def weight_gradients(
    model: PeftModel,
    batches: Sequence[Any],
    loss_fn: LossFn,
    receive: Receive,
    adapter_name: str = "default",
    unadapted: Sequence[str] = (),
) -> None:
    """Hand every adapted layer's gradient G of the mean loss over the batches to `receive`.

    Of one batch, each G is forgotten before the next is formed, last layer first. Of several, their mean (weighted
    by samples) needs one G a layer to be kept: as much memory as full fine-tuning's gradients. Dropout and stochastic
    depth are off; autocast is as the caller has it, G is float32. Parameters' gradients are not touched.

    Args:
        model: the adapted model, with exactly this adapter active.
        batches: as `loss_fn` takes them.
        loss_fn: (model, batch) to the scalar mean loss over the batch's samples.
        receive: called with a layer's name and its G, (out, in), once a layer.
        adapter_name: peft's name of the adapter.
        unadapted: the names of further linear layers, without this adapter, whose gradient is wanted too.

    Raises:
        ValueError: there is no batch, the loss is no finite scalar or does not depend on the adapter, or a layer was
            not reached.
    """
    layers: dict[str, nn.Module] = dict(adapted_layers(model, adapter_name))
    factors = [layer.lora_A[adapter_name].weight for layer in layers.values()]
    for name in unadapted:
        layers[name] = model.get_base_model().get_submodule(name)
        factors.append(_linear(layers[name]).weight)
    if not batches:
        raise ValueError("the gradient needs at least one batch")
    samples = [batch_size(batch) for batch in batches]
    sums: dict[str, Tensor] = {}
    received: set[str] = set()

    def hand_over(name: str, gradient: Tensor) -> None:
        check_finite(gradient, f"the gradient at {name}")
        received.add(name)
        receive(name, gradient)

    def add(name: str, gradient: Tensor) -> None:
        sums[name] = sums[name].add_(gradient) if name in sums else gradient

    def backward(batch: Any, weight: float, receive_one: Receive) -> None:
        with _gradients_formed(layers, receive_one):
            loss = _scalar(explained(loss_fn)(model, batch)) * weight
            torch.autograd.grad(loss, factors, allow_unused=True)

    device = factors[0].device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    half = torch.float16 in (autocast, *(p.dtype for p in model.parameters()))
    with _inputs_of_a_gradient(model, factors), torch.enable_grad():
        for batch, count in zip(batches, samples, strict=True):
            weight = count / sum(samples)
            if half:
                for name, gradient in _scaled(backward, batch).items():
                    add(name, gradient * weight)
            else:
                backward(batch, weight, hand_over if len(batches) == 1 else add)
    for name in list(sums):
        hand_over(name, sums.pop(name))
    silent = [name for name in layers if name not in received]
    if silent:
        raise ValueError(f"no gradient reaches {', '.join(silent)}: check_adapters(model, batch) says more")


def _scaled(backward: Callable[[Any, float, Receive], None], batch: Any) -> dict[str, Tensor]:
    """Every G of a batch, formed at a scale of the loss at which float16 neither rounds it to zero nor overflows."""
    scale = LOSS_SCALE
    while True:
        formed: dict[str, Tensor] = {}
        backward(batch, scale, formed.__setitem__)
        if scale <= 1 or all(gradient.isfinite().all() for gradient in formed.values()):
            return {name: gradient / scale for name, gradient in formed.items()}
        scale /= 2


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        given = f"a tensor {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss_fn must return a scalar tensor, the mean loss over the batch; it returned {given}")
    if not loss.requires_grad:
        raise ValueError("the loss does not depend on the adapter: loss_fn must run the model that it is given")
    if not loss.isfinite():
        raise ValueError(f"the loss is {loss.item()}: check weights, batch (labels that are all -100?) and autocast")
    return loss


@contextmanager
def _inputs_of_a_gradient(model: PeftModel, factors: list[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, and one weight a layer that requires gradient: with it the layer's output is in the graph."""
    with restored(model):
        evaluate(model)
        for factor in factors:
            factor.requires_grad_(True)
        yield


def _linear(layer: nn.Module) -> nn.Module:
    """The linear layer itself, without peft's wrapper."""
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


@contextmanager
def _gradients_formed(layers: dict[str, nn.Module], receive: Receive) -> Iterator[None]:
    """While a forward and a backward pass run, form G of every layer and pass it on when the layer is done.

    A layer may be called several times (shared blocks, a recomputation by gradient checkpointing): G is passed on
    after as many gradients as calls, or at the end.
    """
    waiting = dict.fromkeys(layers, 0)
    sums: dict[str, Tensor] = {}

    def forward(name: str, args: Args, output: Tensor) -> None:
        if not output.requires_grad:
            return
        inputs = args[0].detach()
        waiting[name] += 1

        def backward(gradient: Tensor) -> None:
            formed = _outer(gradient, inputs, _linear(layers[name]))
            sums[name] = sums[name].add_(formed) if name in sums else formed
            waiting[name] -= 1
            if waiting[name] == 0:
                receive(name, sums.pop(name))

        output.register_hook(backward)

    with hooked(layers, after=forward):
        yield
    for name in list(sums):
        receive(name, sums.pop(name))


@torch.no_grad()
def _outer(gradient: Tensor, inputs: Tensor, base_layer: nn.Module) -> Tensor:
    """sum over tokens of g x^T: (out, in), float32."""
    if isinstance(base_layer, nn.Conv2d):  # 1x1: channels are in the second place
        gradient, inputs = gradient.movedim(1, -1), inputs.movedim(1, -1)
    with torch.autocast(gradient.device.type, enabled=False):
        return gradient.reshape(-1, gradient.shape[-1]).float().T @ inputs.reshape(-1, inputs.shape[-1]).float()
