"""Our own initialisations. Torch is imported where it is used: the table is read without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from abm_vision.abm.settings import ABMConfig, AlignConfig
from abm_vision.initializers.record import Ingredients, Initializer, Needs, Properties
from abm_vision.initializers.registry import register_initializer

if TYPE_CHECKING:
    from abm_vision.abm.align import AlignReport
    from abm_vision.abm.report import ABMReport

RANDOM_B_STD = 0.01


def random_b(given: Ingredients) -> None:
    """Draw B at random; A stays as peft has drawn it."""
    import torch

    from abm_vision.abm.merged_linear import BlockLinear

    with torch.no_grad():
        for layer in given.layers.values():
            b = layer.lora_B[given.adapter_name]
            b.weight.normal_(std=RANDOM_B_STD)
            if isinstance(b, BlockLinear):
                b.weight.mul_(b.mask)


register_initializer(
    Initializer(
        "random_b",
        f"A as peft's, B normal with std {RANDOM_B_STD}",
        "a control",
        Needs.NOTHING,
        random_b,
        Properties.BLOCKS,
    )
)


def match_boundaries(given: Ingredients) -> ABMReport:
    """Take steps towards the activation boundaries of the reference, by default the pretrained model."""
    from abm_vision.abm.match import initialize_lora_abm_weights

    return initialize_lora_abm_weights(
        given.model,
        given.batches,
        given.config,
        reference=given.reference or "pretrained",
        adapter_name=given.adapter_name,
        forward_fn=given.forward_fn,
        backbone=given.backbone,
        show_progress_bar=given.progress,
    )


register_initializer(
    Initializer(
        "abm",
        "boundaries matched to the pretrained model's",
        "arXiv:2511.19145",
        Needs.BATCHES,
        match_boundaries,
        Properties.BLOCKS,
        ABMConfig,
    )
)
register_initializer(
    Initializer(
        "abm_tuned",
        "boundaries matched to those of an adapter tuned before",
        "arXiv:2511.19145",
        Needs.REFERENCE,
        match_boundaries,
        Properties.BLOCKS,
        ABMConfig,
        prefix="abm",
    )
)


def align(given: Ingredients) -> AlignReport:
    """Point the factors along the task's gradient, as far as activation boundaries allow."""
    from abm_vision.abm.align import initialize_lora_aligned_weights

    return initialize_lora_aligned_weights(
        given.model,
        given.batches,
        given.config,
        loss_fn=given.loss_fn,
        adapter_name=given.adapter_name,
        forward_fn=given.forward_fn,
        backbone=given.backbone,
    )


register_initializer(
    Initializer(
        "abm_aligned",
        "the gradient's directions, sized so that boundaries stay",
        "arXiv:2511.19145 and this package",
        Needs.LABELS,
        align,
        Properties.BLOCKS,
        AlignConfig,
        prefix="align",
    )
)
