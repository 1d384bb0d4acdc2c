"""Generate answers, and measure the perplexity of given ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abm_vision.abm.restore import evaluate
from abm_vision.runs.device import autocast
from abm_vision.runs.folder import Diverged
from nlp_ext.batches import IGNORED, forward
from nlp_ext.instruct.data import Conversation, end_of_turn, prompt

if TYPE_CHECKING:
    from nlp_ext.instruct.harness import InstructRun


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    turns: Conversation,
    new_tokens: int,
    temperature: float = 0.0,
) -> str:
    """Generate the assistant's next turn: the likeliest tokens at temperature 0, else sampled with torch's seed.

    Raises:
        ValueError: prompt and answer would exceed the model's context.
    """
    inputs = tokenizer(prompt(tokenizer, turns), add_special_tokens=False, return_tensors="pt").to(model.device)
    given, longest = inputs.input_ids.shape[1], getattr(model.config, "max_position_embeddings", None)
    if longest is not None and given + new_tokens > longest:
        raise ValueError(
            f"the conversation has {given} tokens, and the answer may have {new_tokens}; the model reads at most "
            f"{longest}: begin a new one, or lower --new-tokens"
        )
    drawn = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    tokens = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(model, tokenizer),
        **drawn,
    )
    return tokenizer.decode(tokens[0, given:], skip_special_tokens=True).strip()


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end an answer: the model's and the tokeniser's own, and the template's."""
    own = model.generation_config.eos_token_id
    found = {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return sorted(found - {None})


@torch.no_grad()
def perplexity(run: InstructRun, model: nn.Module) -> float:
    """Compute exp of the mean negative log-likelihood over all answer tokens of the held-out conversations.

    Raises:
        Diverged: it is too large for a number, or NaN.
    """
    evaluate(model)
    total, count = 0.0, 0
    rows, size = sorted(run.held_out.rows, key=lambda row: len(row["input_ids"])), run.config.batch_size  # less padding
    for batch in (run.batch(chunk) for chunk in _chunks(rows, size)):
        with autocast(run.device, run.precision):
            loss = forward(model, batch).loss
        tokens = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += loss.item() * tokens
        count += tokens
    if not total / count < LARGEST:
        raise Diverged(f"the loss on held-out answers is {total / count:g}: lower --lr (now {run.config.lr})")
    return math.exp(total / count)


LARGEST = 700.0  # the perplexity of a larger loss is no number of double precision


def _chunks(rows: Sequence[dict[str, list[int]]], size: int) -> list[Sequence[dict[str, list[int]]]]:
    return [rows[k : k + size] for k in range(0, len(rows), size)]
