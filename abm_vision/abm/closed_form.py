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
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.batches import counted
from abm_vision.abm.boundary import Boundary
from abm_vision.abm.hooks import Args, hooked
from abm_vision.abm.reference import Calibration, Part

NEWTON_STEPS = 5
TOKENS = 8192  # of a layer at most, evenly spread: r unknowns a unit need no more
RIDGE = 1e-2  # of the mean of u^2: keeps B where few tokens constrain it


@torch.no_grad()
def fit_locally(adapter: Adapter, calibration: Calibration) -> list[float]:
    """Fit B of every projection in front of a matched activation, in place, on the first calibration batch.

    Returns:
        The weighted boundary loss, averaged over layers, before each Newton step and after the last, each layer's on
        what the fitted layers below it give.

    Raises:
        ValueError: an activation is not fed by one adapted linear layer.
    """
    part, feeders = calibration.parts[0], _feeders(adapter, calibration)
    fed = {feeders[boundary.name]: boundary for boundary in calibration.boundaries}
    layers = {name: adapter.layers[name] for name in fed}
    losses: list[Tensor] = []

    def fit(name: str, args: Args) -> None:
        found = _fit_layer(layers[name], adapter.name, args[0], fed[name], part)
        losses.append(fed[name].weight * found / len(calibration.boundaries))
        torch.clear_autocast_cache()  # autocast would keep using the B that it cast before

    with hooked(layers, before=fit):
        calibration.preactivations(adapter.model, part)
    return torch.stack(losses).sum(0).tolist()


def _fit_layer(layer: LoraLayer, adapter_name: str, inputs: Tensor, boundary: Boundary, part: Part) -> Tensor:
    a, b, base = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight, layer.get_base_layer()
    mask = part.masks[boundary.stack]
    x, sign = (counted(t, mask).flatten(0, -2) for t in (inputs, part.signs[boundary.name]))
    kept = torch.linspace(0, len(x) - 1, min(TOKENS, len(x)), device=x.device).long()
    with torch.autocast(x.device.type, enabled=False):
        x, tau = x[kept].float(), 2.0 * sign[kept] - 1.0
        z = F.linear(x, base.weight.float(), None if base.bias is None else base.bias.float())  # (tokens, hidden)
        u = layer.scaling[adapter_name] * F.linear(x, a.float())  # (tokens, r)
        fitted, losses = _newton(z, u, tau, b.float(), boundary.margin)
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


def _feeders(adapter: Adapter, calibration: Calibration) -> dict[str, str]:
    """Activation module to the adapted linear layer whose output goes into it as it is."""
    layers = adapter.layers
    outputs: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its id stays its own
    with hooked(layers, after=lambda name, _, output: outputs.update({id(output): (name, output)})):
        z = calibration.preactivations(adapter.model, calibration.parts[0].split(1)[0])
    feeders = {name: outputs[id(value)][0] for name, value in z.items() if id(value) in outputs}
    other = [n for n in z if n not in feeders or not isinstance(layers[feeders[n]].get_base_layer(), nn.Linear)]
    if other:
        raise ValueError(
            f"layer-local matching needs an adapted linear layer whose output goes straight into the activation; "
            f'{", ".join(other)} has none. Adapt the MLP, or use fit="end_to_end".'
        )
    return feeders
