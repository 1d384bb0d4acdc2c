"""Batches as transformers' collators make them: mappings of tensors (batch, tokens); label -100 is ignored."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

IGNORED = -100  # the label of a token that the loss ignores, as in transformers


def forward(model: nn.Module, batch: Any) -> Any:
    """Run the model on a batch, without a cache of keys and values, as nothing is generated.

    Raises:
        ValueError: the batch is no mapping.
    """
    check_mapping(batch)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    caches = "use_cache" in inspect.signature(bare.forward).parameters
    return model(**batch, **({"use_cache": False} if caches else {}))


def check_mapping(batch: Any) -> None:
    """Raise a ValueError unless the batch is a mapping."""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"a batch of type {type(batch).__name__} was given; a mapping with input_ids is needed, as transformers' "
            "collators make it. Pass forward_fn=lambda model, batch: ... for anything else"
        )


def loss(model: nn.Module, batch: Any) -> Tensor:
    """Compute the model's own loss, the mean over all tokens (or sequences) of the batch with a label.

    Raises:
        ValueError: the batch has no labels.
    """
    if isinstance(batch, Mapping) and "labels" not in batch:
        raise ValueError(
            f"the batch has {', '.join(sorted(batch))} and no labels: let the collator add them, or pass "
            "loss_fn=lambda model, batch: ..."
        )
    return forward(model, batch).loss


def real_tokens(batch: Mapping[str, Any], stack: str = "") -> Tensor | None:
    """Mark tokens that are no padding: boolean (batch, tokens), or None, for all, without an attention_mask."""
    check_mapping(batch)
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def answer_tokens(batch: Mapping[str, Any], stack: str = "") -> Tensor | None:
    """Mark tokens with a label, such as an instruction's answer: boolean (batch, tokens).

    For decoder-only models: `initialize_lora_abm_weights(model, loader, token_mask_fn=answer_tokens)`.

    Raises:
        ValueError: the batch has no labels, or none that counts.
    """
    check_mapping(batch)
    if "labels" not in batch:
        raise ValueError(f"the batch has {', '.join(sorted(batch))} and no labels, so no answers are known")
    mask = batch["labels"] != IGNORED
    if not mask.any():
        raise ValueError(
            f"no token of a batch has a label other than {IGNORED}: its answers were cut off, or are empty"
        )
    return mask
