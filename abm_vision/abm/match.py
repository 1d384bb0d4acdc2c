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

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.arguments import check_type
from abm_vision.abm.bars import progress
from abm_vision.abm.batches import collect, explained, within
from abm_vision.abm.boundary import boundary_losses, choose_boundaries
from abm_vision.abm.closed_form import fit_locally
from abm_vision.abm.descent import Descent
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.reference import (
    Calibration,
    Masked,
    Part,
    Reference,
    calibrate,
    check_reference,
    masked,
    reference_name,
)
from abm_vision.abm.report import ABMReport, layer_reports
from abm_vision.abm.restore import evaluate, initialising
from abm_vision.abm.settings import ABMConfig
from abm_vision.abm.step import TrainingStep

KEPT = (1.0, 0.5, 0.25, 0.125, 0.0)  # shares of the way that the steps went, tried in turn


def initialize_lora_abm_weights(
    model: PeftModel,
    dataloader: Iterable[Any],
    config: ABMConfig | None = None,
    *,
    reference: Reference = "pretrained",
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

    The loss is never above where it began, on the calibration samples: Adam's last steps may have led upwards, and
    then the way from the first factors to the last is halved until it is not (`ABMReport.kept`).

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
    check_reference(adapter, reference)
    if config.fit == "local":
        adapter.check_no_dora('fit="local"')
        adapter.check_weights('fit="local"', 'use fit="end_to_end"')
    backbone = backbone or find_backbone(model)
    forward_fn = explained(forward_fn or backbone.forward_fn)
    token_mask_fn = token_mask_fn or backbone.token_mask_fn
    with initialising(adapter, config.seed), torch.enable_grad():
        evaluate(model)
        chosen = choose_boundaries(backbone.find_boundaries(model.get_base_model()), config)
        batches = masked(collect(dataloader, adapter.device, config.samples), chosen, token_mask_fn)
        calibration = calibrate(adapter, _enough(batches, config), chosen, config, reference, forward_fn)
        before = calibration.measure(model) if calibration.before is None else calibration.before
        first = [factor.detach().clone() for factor in adapter.trained]
        if config.fit == "local":
            losses = fit_locally(adapter, calibration)
        else:
            losses = _match(adapter, calibration, config, show_progress_bar)
        kept, after = _step_back(adapter, calibration, first, before)
    return ABMReport(
        *layer_reports(calibration, before, after),
        kept=kept,
        loss_per_step=tuple(losses),
        seconds=time.perf_counter() - start,
        samples=calibration.samples,
        reference=reference_name(reference),
        config=config,
    )


def _enough(batches: list[Masked], config: ABMConfig) -> list[Masked]:
    """What the steps will see of the batches, within the budget of tokens."""
    seen = config.samples if config.fit == "local" else min(config.samples, config.steps * config.batch_size)
    return within(batches, seen, config.tokens, lambda b: sum(m.shape[-1] for m in b[1].values() if m is not None))


def _match(adapter: Adapter, calibration: Calibration, config: ABMConfig, show_progress_bar: bool) -> list[float]:
    """Lower Eq. (22) by AdamW on the adapter's factors, a few samples a step, in turn: the loss of every step."""
    descent = Descent(adapter.trained, config.learning_rate, config.steps)
    parts = [small for part in calibration.parts for small in part.split(config.batch_size)]

    def scaled_losses(model: nn.Module, batch: tuple[Part, float | None]) -> Tensor:
        part, scale = batch
        z = calibration.preactivations(model, part)
        losses = boundary_losses(calibration.boundaries, z, part.signs, part.masks)  # Eq. (22) is their mean
        _check_reached(losses)
        return (descent.scale_of(z.values()) if scale is None else scale) * losses

    step = TrainingStep(adapter.model, scaled_losses, say=lambda reason: None)
    found: list[Tensor] = []  # of every step, (layers,)
    descent.clear()
    bar = progress(range(config.steps), "ABM", show=show_progress_bar, unit="step")
    for k in bar:
        part = parts[k % len(parts)]
        found.append(descent.step(lambda scale, part=part: step((part, scale))))
        if not bar.disable and k % 4 == 3:  # it waits for the device
            bar.set_postfix(loss=f"{found[-1].mean().item():.5f}", refresh=False)
    losses = torch.stack(found).cpu()
    _check_finite(losses, calibration)
    return losses.mean(1).tolist()


@torch.no_grad()
def _step_back(adapter: Adapter, calibration: Calibration, first: list[Tensor], before: Tensor) -> tuple[float, Tensor]:
    """Go back towards the first factors until the loss is not above `before`: the share kept, and the figures there."""
    last = [factor.clone() for factor in adapter.trained]
    for kept in KEPT:
        for factor, start, end in zip(adapter.trained, first, last, strict=True):
            factor.copy_(torch.lerp(start, end, kept))
        figures = calibration.measure(adapter.model) if kept else before
        if calibration.loss(figures) <= calibration.loss(before):
            break
    return kept, figures


def _check_finite(losses: Tensor, calibration: Calibration) -> None:
    """Of losses (steps, layers), asked once: after every step it would make the host wait for the device."""
    for step, row in enumerate(losses):
        bad = ", ".join(b.name for b, value in zip(calibration.boundaries, row, strict=True) if not value.isfinite())
        if bad:
            raise ValueError(f"the boundary loss is not finite at step {step}, in {bad}; lower learning_rate")


def _check_reached(losses: Tensor) -> None:
    if not losses.requires_grad:
        raise ValueError(
            "no matched pre-activation depends on the adapter. Either every adapted layer lies behind the matched "
            "boundaries, or gradient checkpointing of the reentrant kind cuts the graph: use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, or switch it off while matching."
        )
