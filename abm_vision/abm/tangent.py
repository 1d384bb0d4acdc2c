"""Information loss: the share of the full gradient that no first step on (A, B) can reach.

The directions that a first step on the factors of one layer can give its weight are B dA + dB A. Their span is the
tangent space of the adapter, and the orthogonal projection of the layer's full gradient G on it is

    P(G) = Pb G + G Pa - Pb G Pa,   Pb = B B^+,   Pa = A^+ A

    information loss = ||G - P(G)||_F^2 / ||G||_F^2  =  1 - (||U^T G||^2 + ||G V||^2 - ||U^T G V||^2) / ||G||^2

with U an orthonormal basis of B's columns and V one of A's rows. It lies in [0, 1]; the scaling of the adapter does
not enter. Where one factor is frozen (MiCA) only the other's directions count. The paper of ABM-LoRA
(arXiv:2511.19145) argues with this quantity.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.batches import batch_size, collect
from abm_vision.abm.gradient import LossFn, weight_gradients
from abm_vision.abm.host import find_backbone
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.names import layer_kind


@dataclass(frozen=True)
class LayerLoss:
    """One layer's, one kind's or the whole model's information loss.

    Args:
        name: module name, kind of layer, or "all".
        energy: ||G||_F^2.
        loss: what the adapter cannot reach, in [0, 1].
        optimum: what the best adapter of the same rank cannot: the share of G beyond its first 2r singular pairs.
        random: what is expected of a random A with B = 0: 1 - r / in.
    """

    name: str
    energy: float
    loss: float
    optimum: float
    random: float


@dataclass(frozen=True)
class InformationLoss:
    """The outcome of `information_loss`: layers in the model's order, samples used, wall time in seconds."""

    layers: tuple[LayerLoss, ...]
    samples: int
    seconds: float

    @property
    def overall(self) -> LayerLoss:
        """The whole model: sum of what is lost over sum of ||G||^2."""
        return _together("all", self.layers)

    @property
    def kinds(self) -> tuple[LayerLoss, ...]:
        """The same for every kind of layer, such as "attn.qkv"."""
        groups: dict[str, list[LayerLoss]] = {}
        for layer in self.layers:
            groups.setdefault(layer_kind(layer.name), []).append(layer)
        return tuple(_together(kind, layers) for kind, layers in groups.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, strings and numbers, ready for JSON."""
        whole = {"overall": asdict(self.overall), "kinds": [asdict(kind) for kind in self.kinds]}
        return json.loads(json.dumps({**whole, **asdict(self)}))  # tuples become lists

    def __str__(self) -> str:
        head = f"{'information loss':<32} {'now':>7} {'optimum':>8} {'random':>7}   share of ||G||^2"
        rows = [
            f"{part.name:<32} {part.loss:7.4f} {part.optimum:8.4f} {part.random:7.4f}   "
            f"{part.energy / (self.overall.energy or 1):.3f}"
            for part in (*self.layers, *self.kinds, self.overall)
        ]
        return "\n".join([head, *rows])


def _together(name: str, parts: Iterable[LayerLoss]) -> LayerLoss:
    parts = tuple(parts)
    energy = sum(p.energy for p in parts)

    def mean(field: str) -> float:
        # A gradient of zero has nothing to lose.
        return sum(getattr(p, field) * p.energy for p in parts) / energy if energy else 0.0

    return LayerLoss(name, energy, mean("loss"), mean("optimum"), mean("random"))


def information_loss(
    model: PeftModel,
    batches: Iterable[Any],
    loss_fn: LossFn | None = None,
    *,
    adapter_name: str = "default",
    unadapted: Sequence[str] = (),
) -> InformationLoss:
    """The information loss of an adapter on a task's batches, exactly, per layer and whole.

    One forward and backward pass a batch, in evaluation mode; modes, gradients and `requires_grad` are as before.
    Of one batch, one layer's full gradient is alive at a time; of several, one a layer is kept (`weight_gradients`).

    Args:
        model: the adapted model, with exactly this adapter active and not merged.
        batches: a loader, or a list of batches as `loss_fn` takes them; they are moved to the model's device.
        loss_fn: (model, batch) to the scalar mean loss over the batch's samples; that of the model's family if None.
        adapter_name: peft's name of the adapter.
        unadapted: the names of linear layers that count with all they lose, such as those to which EVA gave rank 0.

    Raises:
        ValueError: the adapter does not run or is frozen, it is not the active one, or of a kind with another tangent
            space (DoRA); there is no batch, or one that cannot be run; or the gradient cannot be formed.
    """
    start = time.perf_counter()
    adapter = Adapter(model, adapter_name)
    adapter.check_alone()
    adapter.check_no_dora("information loss")
    sides = {name: _blocks(layer, adapter_name) for name, layer in adapter.layers.items()}  # before flags are changed
    found: dict[str, LayerLoss] = {}
    batches = collect(batches, adapter.device)

    def take(name: str, gradient: Tensor) -> None:
        found[name] = _layer_loss(name, gradient, sides.get(name, []))

    weight_gradients(model, batches, loss_fn or find_backbone(model).loss_fn, take, adapter_name, unadapted)
    in_order = [found[name] for name, _ in model.get_base_model().named_modules() if name in found]
    return InformationLoss(tuple(in_order), sum(map(batch_size, batches)), time.perf_counter() - start)


@dataclass(frozen=True)
class Block:
    """The part of a layer's output rows that one pair of factors serves; a frozen factor is None.

    Args:
        rows: of the layer's weight.
        a: (r, in), if B trains: then B's steps give directions dB A.
        b: (rows, r), if A trains.
        rank: r.
    """

    rows: slice
    a: Tensor | None
    b: Tensor | None
    rank: int


def _blocks(layer: LoraLayer, adapter_name: str) -> list[Block]:
    """One block for an ordinary adapter; q and v apart for one that leaves k alone."""
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    steps_a, steps_b = a.requires_grad, b.requires_grad
    a, b = a.detach().flatten(1), b.detach().flatten(1)
    if not isinstance(layer.lora_B[adapter_name], BlockLinear):
        return [Block(slice(None), a if steps_b else None, b if steps_a else None, len(a))]
    dim, rank = len(b) // 3, len(a) // 2
    cuts = [(slice(0, dim), slice(0, rank)), (slice(2 * dim, None), slice(rank, None))]
    return [Block(rows, a[k] if steps_b else None, b[rows, k] if steps_a else None, rank) for rows, k in cuts]


def _layer_loss(name: str, gradient: Tensor, blocks: list[Block]) -> LayerLoss:
    g = exact(gradient)  # (out, in)
    energy = g.square().sum().item()
    if energy == 0:
        return LayerLoss(name, 0.0, 0.0, 0.0, 0.0)
    parts = [(g[block.rows], block) for block in blocks]
    reached = sum(reached_energy(rows, block.a, block.b) for rows, block in parts)
    best = sum(leading_energy(rows, 2 * block.rank) for rows, block in parts)
    random = sum(rows.square().sum().item() * min(1.0, block.rank / g.shape[1]) for rows, block in parts)
    shares = [min(1.0, max(0.0, 1 - value / energy)) for value in (reached, best, random)]  # rounding leaves [0, 1]
    return LayerLoss(name, energy, *shares)


def reached_energy(g: Tensor, a: Tensor | None, b: Tensor | None) -> float:
    """||P(G)||_F^2 of a gradient (out, in), for A (r, in) and B (out, r); None where a factor gives no direction."""
    left = None if b is None else orthonormal_columns(b).T @ g  # U^T G, (<= r, in)
    basis = None if a is None else orthonormal_columns(a.T)  # V, (in, <= r)
    reached = 0.0 if left is None else left.square().sum().item()
    if basis is not None:
        reached += (g @ basis).square().sum().item()
        if left is not None:
            reached -= (left @ basis).square().sum().item()
    return reached


def leading_energy(g: Tensor, count: int) -> float:
    """The sum of the first `count` squared singular values of a float64 matrix."""
    gram = g @ g.T if g.shape[0] <= g.shape[1] else g.T @ g
    return torch.linalg.eigvalsh(gram)[-count:].clamp_min(0).sum().item()


def orthonormal_columns(factor: Tensor) -> Tensor:
    """An orthonormal basis (n, k <= r) of the columns of a factor (n, r), float64; none for a factor of zeros.

    Columns count as dependent where a pseudo-inverse in float32 (for float64 in float64) would drop them: bfloat16's
    own precision would drop all.
    """
    u, s, _ = torch.linalg.svd(exact(factor), full_matrices=False)
    eps = min(torch.finfo(factor.dtype).eps, torch.finfo(torch.float32).eps)
    return u[:, s > s[0] * max(factor.shape) * eps]


def exact(tensor: Tensor) -> Tensor:
    """In float64, on CPU where the device has none (MPS)."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
