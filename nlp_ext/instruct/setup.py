"""A run of instruction tuning before its start: conversations, model, tokeniser, adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from abm_vision.runs.start import Say, settle_device, stopwatch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from abm_vision.abm.checks import check_adapters
from abm_vision.abm.host import Backbone
from abm_vision.abm.lora import add_lora
from abm_vision.abm.restore import evaluate
from abm_vision.runs.content import Origin
from abm_vision.runs.order import shuffled
from nlp_ext.batches import answer_tokens
from nlp_ext.instruct import data
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.models import load_model
from nlp_ext.ranks import text_device
from nlp_ext.textrun import TextRun, text_origin, together, token_digest


@dataclass
class Setup(TextRun):
    """The adapted model and its data.

    Args:
        held_out: conversations for the perplexity.
        prompts: what is to be answered: held-out conversations without their last answer.
    """

    config: InstructConfig
    held_out: data.Tokens
    prompts: list[data.Conversation]

    @property
    def backbone(self) -> Backbone:
        """The model's record, with the mask that the settings ask for."""
        found = super().backbone
        return found if self.config.abm_tokens == "all" else replace(found, token_mask_fn=answer_tokens)


def prepare(config: InstructConfig, folder: Path, quiet: bool, say: Say) -> Setup:
    """Everything that a run needs before its start.

    Raises:
        ValueError, OSError: of the data, the model, or the adapter, each with one message.
    """
    device = text_device(config.device)
    precision = settle_device(device, config, folder, say)
    seconds: dict[str, float] = {}
    stage = stopwatch(seconds)
    with stage("weights"):
        model, tokenizer, weights = load_model(
            config.model, AutoModelForCausalLM, "tiny-llama", show_progress_bar=not quiet, **_kept_as(config, device)
        )
        model = model if config.base == "4bit" else model.to(device)
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        _check_length(config, model)
        say(f"weights   {weights}, {config.base}")
    with stage("data"):
        conversations = data.read(config.data_source)
        if len(conversations) <= config.held_out:
            raise ValueError(
                f"{config.data_source} has {len(conversations)} conversations, of which {config.held_out} would be "
                "held out: lower --held-out"
            )
        (order,) = shuffled(len(conversations), len(conversations), config.seed, 0)
        kept, tested = order[: -config.held_out][: config.train_examples or None], order[-config.held_out :]
        train, held_out = (
            data.encode_all(tokenizer, [conversations[k] for k in part], config.length) for part in (kept, tested)
        )
        prompts = [conversations[k][:-1] for k in tested[: config.samples]]
        say(f"data      {config.data_source}: {train.conversations} conversations, {held_out.conversations} held out")
    with stage("lora"):
        torch.manual_seed(config.seed)
        targets = config.lora_targets()
        adapted = add_lora(model, config.rank, config.alpha, targets=targets, dropout=config.dropout)
        record = {
            "train": train.record(config.data_source),
            "held_out": held_out.record(config.data_source),
            "sha256": data.digest(conversations),
        }
        tokens = token_digest([*train.rows, *held_out.rows])
        digest = {"instruction": lambda: record["sha256"]}
        origin = {**together(text_origin(config, digest, data.encode_all)), "tokens": tokens}
        setup = Setup(
            config, adapted, tokenizer, train.rows, record, weights, origin, device, precision, seconds, held_out,
            prompts,
        )  # fmt: skip
        check_adapters(evaluate(adapted), setup.batch(train.rows[:2]))
    return setup


def origin_parts(config: InstructConfig) -> list[Callable[[], Origin]]:
    """What gives the content that a run of this configuration would be made of now, but for its tokens."""
    digest = {"instruction": lambda: data.digest(data.read(config.data_source))}
    return text_origin(config, digest, data.encode_all)


def _kept_as(config: InstructConfig, device: torch.device) -> dict[str, Any]:
    """How `from_pretrained` is to keep the frozen weights."""
    if config.base != "4bit":
        return {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[config.base]}
    if find_spec("bitsandbytes") is None:
        raise ValueError("base 4bit needs bitsandbytes: pip install bitsandbytes, or use --base bf16")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantised, "device_map": {"": device}, "dtype": torch.bfloat16}


def _check_length(config: InstructConfig, model: torch.nn.Module) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.length > longest:
        raise ValueError(f"length is {config.length}; {config.model} reads at most {longest} tokens")
