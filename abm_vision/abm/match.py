"""Activation boundary matching: fit a LoRA adapter so that hidden units stay on their side of the boundary.

Paper: Lee, Park, Kim, Kwon, "ABM-LoRA", arXiv:2511.19145, Eq. (22).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from abm_vision.abm.adapter import Adapter, check_base
from abm_vision.abm.arguments import check_type
from abm_vision.abm.bars import progress
from abm_vision.abm.batches import collect, explained
from abm_vision.abm.calibration import Calibration, Layer, calibrate, choose_layers, measure
from abm_vision.abm.closed_form import fit_locally
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn, preactivations
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.loss import boundary_loss
from abm_vision.abm.report import ABMReport, layer_reports
from abm_vision.abm.restore import evaluate, initialising
from abm_vision.abm.settings import ABMConfig


def initialize_lora_abm_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    config: ABMConfig | None = None,
    *,
    reference: str | nn.Module = "pretrained",
    adapter_name: str = "default",
    forward_fn: ForwardFn | None = None,
    token_mask_fn: TokenMaskFn | None = None,
    backbone: Backbone | None = None,
    show_progress_bar: bool = True,
) -> ABMReport:
    """Match the adapter's activation boundaries to a reference's, in place, before training.

    Signs of the reference are computed once per calibration batch and kept as bits; the forward pass ends at the
    last matched layer; dropout and stochastic depth are off. Autocast is as the caller has it, the loss is in
    float32. Base weights are never touched. Modes, hooks, `requires_grad` and random states are given back, and
    if anything raises, the adapter's weights too. Make the optimiser, and call `torch.compile`, afterwards.

    With the "pretrained" reference nothing is to be matched at first: with B = 0 the adapted model is the
    reference. The loss then comes from the units that lie inside the margin; minimising it makes B non-zero and
    lets the match rate fall a little. An adapter that was tuned on the task is a different reference, and its
    tuning is part of the cost.

    Args:
        model: the adapted model, on its device.
        dataloader: yields calibration batches: tensors, tuples or mappings that `forward_fn` takes.
        config: the settings, `ABMConfig()` if None.
        reference: where the signs come from: "pretrained" (this model with its adapters switched off), the name
            of another adapter of this model, or another model with the same activation modules.
        adapter_name: the adapter to initialise; it must be the active one.
        forward_fn: (model, batch) runs the model; the backbone's if None.
        token_mask_fn: (batch, stack) to the boolean mask of tokens that count; the backbone's if None.
        backbone: the record of the model's family; found from the model if None.
        show_progress_bar: a tqdm bar over the optimiser steps.

    Returns:
        Losses, match rates and shares inside the margin before and after, per layer and overall.

    Raises:
        ValueError: the model is not ready (merged, compiled, several active adapters, changed base ...), the
            loader is empty, a batch cannot be run, a boundary never fires, or an activation is not finite.
    """
    start = time.perf_counter()
    config = config or ABMConfig()
    check_type("config", config, ABMConfig)
    adapter = Adapter(model, adapter_name)
    adapter.check_alone()
    _check_reference(adapter, reference)
    if config.fit == "local":
        adapter.check_no_dora('fit="local"')
        adapter.check_weights('fit="local"')
    backbone = backbone or find_backbone(model)
    forward_fn = explained(forward_fn or backbone.forward_fn)
    token_mask_fn = token_mask_fn or backbone.token_mask_fn
    with initialising(adapter, config.seed), torch.enable_grad():
        evaluate(model)
        layers = choose_layers(model.get_base_model(), backbone, config)
        batches = collect(dataloader, adapter.device, config.samples)
        calibration = calibrate(adapter, batches, layers, config, reference, forward_fn, token_mask_fn)
        before = calibration.before if calibration.before is not None else measure(model, calibration, forward_fn)
        if config.fit == "local":
            losses = fit_locally(model, calibration, adapter_name, forward_fn)
        else:
            losses = _optimise(model, calibration, adapter.trained, forward_fn, config, show_progress_bar)
        after = measure(model, calibration, forward_fn)
    return ABMReport(
        *layer_reports(calibration, before, after),
        loss_per_step=tuple(losses),
        seconds=time.perf_counter() - start,
        samples=calibration.samples,
        reference=_reference_name(reference),
        config=config,
    )


def _check_reference(adapter: Adapter, reference: str | nn.Module) -> None:
    if isinstance(reference, nn.Module):
        return
    if reference == "pretrained":
        check_base(adapter.model, "Pass reference=<an unchanged copy of the model>")
        return
    others = [name for name in adapter.model.peft_config if name != adapter.name]
    if reference not in others:
        raise ValueError(f"reference {reference!r} is neither 'pretrained' nor one of the other adapters {others}")


def _optimise(
    model: PeftModel,
    calibration: Calibration,
    factors: list[Tensor],
    forward_fn: ForwardFn,
    config: ABMConfig,
    show_progress_bar: bool,
) -> list[float]:
    """AdamW on the adapter's factors; a few samples a step, in turn. Returns the loss of every step.

    The rate falls linearly towards zero: a constant one ends wherever its last batch, often a single one, has pushed.
    """
    # Half precision has no room for AdamW's steps: they are made on float32 copies.
    masters = [f if torch.finfo(f.dtype).bits >= 32 else f.detach().float() for f in factors]
    optimiser = torch.optim.AdamW(masters, lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1.0 / config.steps, total_iters=config.steps - 1)
    parts = [small for part in calibration.parts for small in part.split(config.batch_size)]
    losses: list[Tensor] = []
    scale = 1.0
    bar = progress(range(config.steps), "ABM", show=show_progress_bar, unit="step")
    for step in bar:
        part = parts[step % len(parts)]
        recorded = preactivations(model, part.batch, calibration.names, forward_fn)
        if step == 0 and any(z.dtype == torch.float16 for z in recorded.values()):
            scale = float(max(z.numel() for z in recorded.values()))  # undoes the mean: dL/dz is of the order of m
        per_layer = layer_losses(calibration.layers, recorded, part)
        if not torch.isfinite(per_layer).all():
            bad = [layer.name for layer, ok in zip(calibration.layers, per_layer.isfinite(), strict=True) if not ok]
            raise ValueError(
                f"the boundary loss is not finite at step {step}, in {', '.join(bad)}; lower learning_rate"
            )
        if not per_layer.requires_grad:
            raise ValueError(
                "no matched pre-activation depends on the adapter. Either every adapted layer lies behind the matched "
                "boundaries, or gradient checkpointing of the reentrant kind cuts the graph: use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it off while matching."
            )
        loss = per_layer.mean()
        gradients, scale = _gradients(loss, factors, scale)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient  # None behind the last boundary: AdamW leaves such a factor alone
        optimiser.step()
        with torch.no_grad():
            for factor, master in zip(factors, masters, strict=True):
                if master is not factor:
                    factor.copy_(master)
        schedule.step()
        losses.append(loss.detach())
        if not bar.disable:
            bar.set_postfix(loss=f"{loss.item():.5f}", refresh=False)
    return torch.stack(losses).tolist()


def _gradients(loss: Tensor, factors: list[Tensor], scale: float) -> tuple[list[Tensor | None], float]:
    """dL/dA and dL/dB in float32 at least, and the scale at which they were finite.

    In float16 the gradient of a mean over all units is rounded to zero, so the loss is multiplied by `scale`, which is
    halved for as long as the gradient overflows.
    """
    while True:
        scaled = torch.autograd.grad(loss * scale, factors, allow_unused=True, retain_graph=scale > 1)
        if scale <= 1 or all(g is None or g.isfinite().all() for g in scaled):
            return [
                g if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in scaled
            ], scale
        scale /= 2


def layer_losses(layers: list[Layer], recorded: dict[str, Tensor], part: Any) -> Tensor:
    """w_l^2 times the boundary loss of each layer, Eq. (22), arXiv:2511.19145: (layers,), float32."""
    losses = [
        layer.weight * boundary_loss(recorded[layer.name], part.sign(layer.name), layer.margin, part.mask(layer))
        for layer in layers
    ]
    return torch.stack([loss.to(losses[0].device) for loss in losses])  # of a model spread over devices


def _reference_name(reference: str | nn.Module) -> str:
    if isinstance(reference, nn.Module):
        return f"another {type(reference).__name__}"
    return reference if reference == "pretrained" else f"adapter {reference!r}"
