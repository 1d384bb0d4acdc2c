"""`initialize_lora`: any initialisation of the table, applied to a fresh adapter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from torch import nn

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.batches import collect, explained
from abm_vision.abm.gradient import LossFn
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.lora import settle_modes
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.restore import initialising
from abm_vision.abm.settings import InitConfig
from abm_vision.initializers.record import Ingredients, Initializer, Needs, Properties
from abm_vision.initializers.registry import INITIALIZERS, get_initializer

if TYPE_CHECKING:
    from abm_vision.initializers.record import Report


def initialize_lora(
    model: PeftModel,
    init: str,
    dataloader: Iterable[Any] | None = None,
    *,
    config: InitConfig | None = None,
    reference: str | nn.Module | None = None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn | None = None,
    token_mask_fn: TokenMaskFn | None = None,
    adapter_name: str = "default",
    backbone: Backbone | None = None,
    show_progress_bar: bool = True,
) -> Report:
    """Initialise a fresh adapter by any row of the table, in place, before the optimiser is made.

    Peft's own initialisations run through peft's own code. Those that change the base weights (PiSSA, OLoRA, CorDA,
    LoRA-GA) leave the model's output where it was, but switching the adapter off no longer gives the pretrained model;
    `save_adapter` writes what loads on the untouched base.

    Args:
        model: fresh from `add_lora`, on its device.
        init: a name of `INITIALIZERS`.
        dataloader: yields calibration batches, for an initialisation that needs them; `config.samples` samples are
            taken.
        config: the settings, of the class that the row names: `ABMConfig`, `AlignConfig`, for most `InitConfig` (number
            of samples, seed). Its defaults if None.
        reference: for "abm_tuned": the name of another adapter of this model, or another model.
        loss_fn: (model, batch) to the scalar mean loss, for one that needs labels; the backbone's if None.
        forward_fn: (model, batch) runs the model; the backbone's if None.
        token_mask_fn: (batch, stack) to the boolean mask of tokens that count, for an initialisation that looks at
            activations; the backbone's if None.
        adapter_name: the adapter to initialise; it must be the active one.
        backbone: the record of the model's family; found from the model if None.
        show_progress_bar: a tqdm bar, for an initialisation that takes steps.

    Returns:
        The report of an initialisation of ours that matches boundaries, else None.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), settings of another class, no dataloader, labels
            or reference for an initialisation that needs them, a kind of layer or adapter that it cannot serve, or an
            adapter that is not fresh.
    """
    row = get_initializer(init)
    config = row.config() if config is None else config
    if type(config) is not row.config:
        raise ValueError(f"config is {config!r}; for {init} it must be of type {row.config.__name__}, or None")
    adapter = Adapter(model, adapter_name)
    adapter.check_fresh()
    _check_served(adapter, row)
    backbone = backbone or find_backbone(model)
    backbone = replace(backbone, token_mask_fn=token_mask_fn) if token_mask_fn else backbone
    if row.needs and dataloader is None:
        raise ValueError(f"{init} needs {row.needs}: pass a dataloader")
    if Needs.REFERENCE in row.needs and reference is None:
        raise ValueError(f"{init} needs a reference: the name of an adapter tuned on the task, or a tuned model")
    with initialising(adapter, config.seed, base=Properties.CHANGES_BASE in row.properties):
        given = Ingredients(
            model=model,
            adapter_name=adapter_name,
            config=config,
            batches=collect(dataloader, adapter.device, config.samples) if row.needs else [],
            backbone=backbone,
            forward_fn=explained(forward_fn or backbone.forward_fn),
            loss_fn=loss_fn or backbone.loss_fn,
            reference=reference,
            progress=show_progress_bar,
        )
        report = row.apply(given)
    settle_modes(model, adapter_name)  # peft has made the inner modules anew
    return report


def _check_served(adapter: Adapter, row: Initializer) -> None:
    """Raise a ValueError if a kind of layer, adapter or model is not what the initialisation is made for."""
    others = ", ".join(name for name in adapter.model.peft_config if name != adapter.name)
    if others and Properties.BEYOND_FACTORS in row.properties:
        raise ValueError(f"{row.name} changes more than its adapter, which {others} would suffer: initialise it alone")
    if Properties.READS_WEIGHTS in row.properties:
        others = [name for name, other in INITIALIZERS.items() if Properties.READS_WEIGHTS not in other.properties]
        adapter.check_weights(row.name, f"take an initialisation that does not: {', '.join(others)}")
    if Properties.BLOCKS in row.properties:
        return
    for name, layer in adapter.layers.items():
        if isinstance(layer.lora_B[adapter.name], BlockLinear):
            raise ValueError(f"{row.name} cannot leave k alone inside the fused {name}: use qkv='full'")
        if not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(f"{row.name} is for nn.Linear layers alone, {name} is a {kind}: leave it out of targets")
