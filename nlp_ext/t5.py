"""T5: the `Backbone` of T5 and its relatives. Nothing here imports transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from abm_vision.abm.host import Backbone
from nlp_ext import batches

# Sequence classification wraps the model as `transformer`.
_BLOCK = r"(?:transformer\.)?(?:encoder|decoder)\.block\.\d+\.layer\.\d"
_STACKS = ("encoder", "decoder")
_FAMILIES = ("t5", "mt5", "umt5")  # ByT5 and Flan are T5 by their classes
_HEADS = ("classification_head", "classifier", "qa_outputs")


def _matches(model: nn.Module) -> bool:
    return any(t.__module__ == f"transformers.models.{f}.modeling_{f}" for t in type(model).__mro__ for f in _FAMILIES)


def _heads(model: nn.Module) -> list[str]:
    """Heads of classifiers and question answering; a language model's output layer is tied or stays frozen."""
    return [name for name, _ in model.named_children() if name in _HEADS]


def _input_stack(name: str) -> str:
    """Cross-attention takes its keys and values from the encoder."""
    from_encoder = ".decoder." not in f".{name}" or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
    return "encoder" if from_encoder else "decoder"


def _forward(model: nn.Module, batch: Any) -> Any:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(batch, Mapping) and hasattr(bare, "decoder") and not batch.keys() & _DECODER_INPUTS:
        raise ValueError(
            f"T5's decoder needs labels or decoder_input_ids; the batch has {', '.join(sorted(batch))}. Let the "
            "collator add labels"
        )
    return batches.forward(model, batch)


_DECODER_INPUTS = {"labels", "decoder_input_ids", "decoder_inputs_embeds"}


def _real_tokens(batch: Mapping[str, Any], stack: str) -> Tensor | None:
    """The encoder's tokens by attention_mask; the decoder's by decoder_attention_mask, else those that predict a label.

    T5 shifts labels to the right to get the decoder's inputs: position t predicts label t. With one class per sentence
    (labels (batch,)) it shifts the encoder's inputs.
    """
    batches.check_mapping(batch)
    if stack == "encoder":
        return batches.real_tokens(batch)
    if (mask := batch.get("decoder_attention_mask")) is not None:
        return mask.bool()
    labels = batch.get("labels")
    if labels is None:  # decoder_input_ids alone: padding is unknown
        return None
    return labels != batches.IGNORED if labels.ndim > 1 else batches.real_tokens(batch)


T5 = Backbone(
    name="T5",
    matches=_matches,
    target_modules={
        "attention": rf"{_BLOCK}\.(?:Self|EncDec)Attention\.[qkvo]",
        "mlp": rf"{_BLOCK}\.DenseReluDense\.(?:wi|wi_0|wi_1|wo)",
    },
    # Of a gated MLP the input of `act` is that of wi_0; wi_1 is the linear branch and has no boundary.
    boundary_modules={s: rf"(?:transformer\.)?{s}\.block\.\d+\.layer\.\d\.DenseReluDense\.act" for s in _STACKS},
    key_modules=r".*\.k",
    head_modules=_heads,
    forward_fn=_forward,
    loss_fn=batches.loss,
    token_mask_fn=_real_tokens,
    input_stack=_input_stack,
    task_type=lambda model: "SEQ_2_SEQ_LM" if hasattr(model, "lm_head") else None,
)
