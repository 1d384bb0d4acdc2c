"""The aligned initialisation: the factors point along the task's gradient, and stay so small that boundaries stay too.

Step 1, directions. One backward pass over calibration batches gives every adapted layer's full gradient G (out, in);
of several batches their mean, one G a layer. With G = sum_i s_i u_i v_i^T, B gets the columns u_1 .. u_r and A the rows
v_(r+1) .. v_(2r): no pair is spent twice, so that the adapter's tangent space (`tangent.py`) holds the first 2r pairs
of this G, the best that rank r can do. (A from v_1 .. v_r would too: `benchmarks/directions.py` compares them.) Base
weights are not touched, as they are by LoRA-GA (arXiv:2407.05000).

Step 2, size. B A is not zero, so the model's output moves. B is made so small that activation boundaries stay: the
share of hidden units on the pretrained model's side (the match rate of arXiv:2511.19145) is at least the target.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.arguments import check_type
from abm_vision.abm.batches import collect, explained
from abm_vision.abm.boundary import choose_boundaries
from abm_vision.abm.gradient import LossFn, weight_gradients
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.reference import Calibration, calibrate, masked
from abm_vision.abm.report import BoundaryState, LayerReport, layer_reports
from abm_vision.abm.restore import evaluate, initialising
from abm_vision.abm.settings import ABMConfig, AlignConfig

HALVINGS = 30  # 1e-9 of the size: below the rounding of every precision


@dataclass(frozen=True)
class AlignReport:
    """The outcome of `initialize_lora_aligned_weights`.

    Args:
        layers: the boundaries in the order in which they fire, before and after.
        before: the same overall, as in `ABMReport`.
        after: likewise.
        size: length of the columns of B that came out.
        samples: calibration samples used.
        seconds: wall time of the whole call.
        config: the settings.
        reference: the boundaries are the pretrained model's.
    """

    layers: tuple[LayerReport, ...]
    before: BoundaryState
    after: BoundaryState
    size: float
    samples: int
    seconds: float
    config: AlignConfig
    reference: str = "pretrained"

    def to_dict(self) -> dict[str, Any]:
        """Everything as dictionaries and numbers, ready for JSON."""
        return json.loads(json.dumps(asdict(self)))

    def summary(self) -> str:
        """One line."""
        return (
            f"columns of B of length {self.size:.4f}, match rate {self.after.match:.4f}, {self.samples} samples, "
            f"{self.seconds:.1f} s"
        )


def initialize_lora_aligned_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    config: AlignConfig | None = None,
    *,
    loss_fn: LossFn | None = None,
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    token_mask_fn: TokenMaskFn | None = None,
    backbone: Backbone | None = None,
) -> AlignReport:
    """Point a fresh adapter along the task's gradient, in place, as far as activation boundaries allow.

    Args:
        model: the adapted model, on its device.
        dataloader: yields labelled calibration batches.
        config: the settings, `AlignConfig()` if None.
        loss_fn: (model, batch) to the scalar mean loss; the backbone's if None.
        adapter_name: the adapter to initialise; it must be the active one.
        forward_fn: (model, batch) runs the model; the backbone's if None.
        token_mask_fn: (batch, stack) to the boolean mask of tokens that count; the backbone's if None.
        backbone: the record of the model's family; found from the model if None.

    Raises:
        ValueError: the adapter is not fresh or cannot run, the loader is empty or without labels, or a batch cannot be
            run.
    """
    start = time.perf_counter()
    config = config or AlignConfig()
    check_type("config", config, AlignConfig)
    adapter = Adapter(model, adapter_name)
    adapter.check_fresh()
    adapter.check_no_dora("the aligned initialisation")
    backbone = backbone or find_backbone(model)
    forward_fn = explained(forward_fn or backbone.forward_fn)
    with initialising(adapter, config.seed):
        evaluate(model)
        batches = collect(dataloader, adapter.device, config.samples)
        chosen = choose_boundaries(backbone.find_boundaries(model.get_base_model()), ABMConfig())
        with_masks = masked(batches, chosen, token_mask_fn or backbone.token_mask_fn)
        calibration = calibrate(adapter, with_masks, chosen, ABMConfig(), "pretrained", forward_fn)
        before = calibration.measure(model) if calibration.before is None else calibration.before
        _point(adapter, batches, loss_fn or backbone.loss_fn, config)
        size, after = _shrink(adapter, calibration, config)
    seconds = time.perf_counter() - start
    return AlignReport(*layer_reports(calibration, before, after), size, calibration.samples, seconds, config)


def _point(adapter: Adapter, batches: list[Any], loss_fn: LossFn, config: AlignConfig) -> None:
    """Step 1: A and B of every layer from the singular vectors of its gradient."""
    layers, name = adapter.layers, adapter.name
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def decompose(layer_name: str, gradient: Tensor) -> None:
        if not gradient.any():
            raise ValueError(
                f"the gradient at {layer_name} is zero, so it has no directions: a head that starts at zero passes "
                "nothing back; draw it at random first"
            )
        layer = layers[layer_name]
        directions = _qv_directions if isinstance(layer.lora_B[name], BlockLinear) else _directions
        found[layer_name] = directions(gradient, layer.r[name])

    weight_gradients(adapter.model, batches, loss_fn, decompose, name)
    with torch.no_grad():
        for layer_name, (rows, columns) in found.items():
            a, b = layers[layer_name].lora_A[name].weight, layers[layer_name].lora_B[name].weight
            a.copy_((config.norm * rows).view_as(a))
            b.copy_((config.size * columns).view_as(b))


def _qv_directions(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same of a fused qkv: q and v each have half of the rank, k has none."""
    dim = len(gradient) // 3
    pairs = [_directions(part, rank // 2) for part in (gradient[:dim], gradient[2 * dim :])]
    columns = torch.block_diag(pairs[0][1], pairs[1][1])
    columns = torch.cat([columns[:dim], columns.new_zeros(dim, rank), columns[dim:]])
    return torch.cat([pairs[0][0], pairs[1][0]]), columns


def _directions(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows v_(r+1) .. v_(2r) (r, in) and columns u_1 .. u_r (out, r) of G's singular vectors.

    Where G has fewer than 2r, A takes the last r there are.
    """
    with torch.autocast(gradient.device.type, enabled=False):
        u, _, v = torch.svd_lowrank(gradient, q=min(2 * rank + 4, *gradient.shape), niter=4)
    last = min(2 * rank, v.shape[1])
    return v[:, last - rank : last].T, u[:, :rank]


@torch.no_grad()
def _shrink(adapter: Adapter, calibration: Calibration, config: AlignConfig) -> tuple[float, Tensor]:
    """Step 2: halve every B until the match rate is at the target: the length of its columns, and the figures."""
    size = config.size
    for _ in range(HALVINGS):
        figures = calibration.measure(adapter.model)
        if figures[:, 1].mean().item() >= config.match:
            return size, figures
        for layer in adapter.layers.values():
            layer.lora_B[adapter.name].weight.mul_(0.5)
        size *= 0.5
    raise ValueError(
        f"the match rate stays at {figures[:, 1].mean().item():.6f}, below {config.match}, however small B is: "
        "rounding alone moves units across; lower match"
    )
