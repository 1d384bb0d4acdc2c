"""Layer-local boundary matching: every boundary fitted on its own, in closed form, during one forward pass.

With x the input of the projection W in front of an activation, A fixed and u = s A x, the boundary loss of the layer,
Eq. (22) of arXiv:2511.19145, is a sum over hidden units h of

    mean over tokens of [max(0, m - tau_h (w_h x + b_h + B_h u))]^2

which is convex in row h of B and has r unknowns. A few Newton steps solve it for all units at once: a product of
(hidden, tokens) with (tokens, r^2) and a batch of r x r systems each. No gradient is taken. A layer is fitted when the
pass reaches it, so its x is what the layers below, already fitted, make of the samples: the reference's own x would
hide from it what they have changed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.calibration import Calibration, Layer, Part
from abm_vision.abm.hooks import ForwardFn, preactivations
from abm_vision.abm.loss import counted

NEWTON_STEPS = 5
TOKENS = 8192  # of a layer at most, evenly spread: r unknowns a unit need no more
RIDGE = 1e-2  # of the mean of u^2: keeps B where few tokens constrain it


@torch.no_grad()
def fit_locally(model: PeftModel, calibration: Calibration, adapter_name: str, forward_fn: ForwardFn) -> list[float]:
    """Fit B of every projection in front of a matched activation, in place, on the first calibration batch.

    Returns:
        The weighted boundary loss, averaged over layers, before each Newton step and after the last, each layer's on
        what the fitted layers below it give.

    Raises:
        ValueError: an activation is not fed by one adapted linear layer.
    """
    part = calibration.parts[0]
    layers, feeders = adapted_layers(model, adapter_name), _feeders(model, calibration, adapter_name, forward_fn)
    totals: list[Tensor] = []

    def fit(layer: Layer, feeder: LoraLayer, inputs: Tensor) -> None:
        losses = _fit_layer(layer, feeder, inputs, part, adapter_name)
        totals.append(layer.weight * losses / len(calibration.layers))
        torch.clear_autocast_cache()  # autocast would go on with the B that it cast before

    hooks = [
        layers[feeders[layer.name]].register_forward_pre_hook(
            lambda module, args, layer=layer: fit(layer, module, args[0])
        )
        for layer in calibration.layers
    ]
    try:
        preactivations(model, part.batch, calibration.names, forward_fn)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(totals).sum(0).tolist()


def _fit_layer(layer: Layer, feeder: LoraLayer, inputs: Tensor, part: Part, adapter_name: str) -> Tensor:
    a, b = feeder.lora_A[adapter_name].weight, feeder.lora_B[adapter_name].weight
    base, mask, sign = feeder.get_base_layer(), part.mask(layer), part.sign(layer.name)
    x, sign = (counted(t, mask).flatten(0, -2) for t in (inputs, sign))
    kept = torch.linspace(0, len(x) - 1, min(TOKENS, len(x)), device=x.device).long()
    with torch.autocast(x.device.type, enabled=False):
        x, tau = x[kept].float(), 2.0 * sign[kept] - 1.0
        z = F.linear(x, base.weight.float(), None if base.bias is None else base.bias.float())  # (tokens, hidden)
        u = feeder.scaling[adapter_name] * F.linear(x, a.float())  # (tokens, r)
        fitted, losses = _newton(z, u, tau, b.float(), layer.margin)
    b.copy_(fitted)
    return losses


def _newton(z: Tensor, u: Tensor, tau: Tensor, start: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Minimise the boundary loss plus a small pull towards `start` over B (hidden, r).

    Args:
        z: (tokens, hidden) pre-activations of the base layer.
        u: (tokens, r) scaled outputs of A.
        tau: (tokens, hidden) signs, -1 or 1.
        start: (hidden, r).
        margin: m, in units of z.

    Returns:
        B, and the boundary loss before every step and after the last, (steps + 1,) float64 on CPU.
    """
    b, rank = start, u.shape[1]
    ridge = RIDGE * u.square().mean() * torch.eye(rank, device=u.device)
    pairs = (u[:, :, None] * u[:, None, :]).flatten(1)  # (tokens, r^2)
    losses = []
    for _ in range(NEWTON_STEPS):
        short = (margin - tau * (z + u @ b.T)).clamp_min(0)  # how far inside the margin, (tokens, hidden)
        losses.append(short.square().mean())
        curvature = ((short > 0).to(u).T @ pairs).unflatten(1, (rank, rank)) / len(u) + ridge
        slope = (short * tau).T @ u / len(u) - (b - start) @ ridge
        b = b + torch.linalg.solve(curvature, slope)
    losses.append((margin - tau * (z + u @ b.T)).clamp_min(0).square().mean())
    return b, torch.stack(losses).cpu().double()


def _feeders(model: PeftModel, calibration: Calibration, adapter_name: str, forward_fn: ForwardFn) -> dict[str, str]:
    """Activation module to the adapted linear layer whose output goes into it as it is."""
    layers = adapted_layers(model, adapter_name)
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own

    def remember(name: str, output: Tensor) -> None:
        outputs[id(output)] = (name, output)

    hooks = [m.register_forward_hook(lambda _, __, out, n=n: remember(n, out)) for n, m in layers.items()]
    try:
        part = calibration.parts[0].split(1)[0]
        recorded = preactivations(model, part.batch, calibration.names, forward_fn)
    finally:
        for hook in hooks:
            hook.remove()
    feeders = {name: outputs[id(z)][0] for name, z in recorded.items() if id(z) in outputs}
    other = [n for n in recorded if n not in feeders or not isinstance(layers[feeders[n]].get_base_layer(), nn.Linear)]
    if other:
        raise ValueError(
            f"layer-local matching needs an adapted linear layer whose output goes straight into the activation; "
            f'{", ".join(other)} has none. Adapt the MLP, or use fit="end_to_end".'
        )
    return feeders
