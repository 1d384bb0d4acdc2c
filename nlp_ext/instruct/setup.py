"""A run of instruction tuning before its start: conversations, model, tokeniser, adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.runs.device import resolve_device
from abm_vision.runs.folder import settle_precision
from abm_vision.runs.order import diagnosis_batches, shuffled
from abm_vision.runs.start import Say, stopwatch
from nlp_ext.batches import answer_tokens
from nlp_ext.instruct import data
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.models import Weights, load_model

Batch = dict[str, Tensor]


@dataclass
class Setup:
    """The adapted model and its data: what a start needs (`abm_vision.runs.start.Ready`), and the training."""

    config: InstructConfig
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: data.Tokens
    held_out: data.Tokens
    prompts: list[data.Conversation]  # to be answered: held-out conversations without their last answer
    sha256: str  # of all conversations
    weights: Weights
    device: torch.device
    precision: str
    seconds: dict[str, float]

    @property
    def weights_sha256(self) -> str:
        """What a tuned reference must have been tuned on."""
        return self.weights.sha256

    @property
    def backbone(self) -> Backbone:
        """The model's record, with the mask that the settings ask for."""
        found = find_backbone(self.model)
        return found if self.config.abm_tokens == "all" else replace(found, token_mask_fn=answer_tokens)

    @property
    def data(self) -> dict[str, Any]:
        """What a result says of its data."""
        parts = {
            name: {
                "source": self.config.data_source,
                "conversations": len(tokens.rows),
                "cut": tokens.cut,
                "left_out": tokens.left_out,
            }
            for name, tokens in (("train", self.train), ("held_out", self.held_out))
        }
        return {**parts, "sha256": self.sha256}

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that is taken up again must find unchanged."""
        return {"data": self.data, "weights_sha256": self.weights.sha256}

    def batch(self, rows: Sequence[dict[str, list[int]]]) -> Batch:
        """Padded tensors (conversations, tokens) on the device."""
        collator = DataCollatorForSeq2Seq(self.tokenizer)
        return {k: v.to(self.device) for k, v in collator([dict(row) for row in rows]).items()}

    def calibration(self) -> Iterator[Batch]:
        """The shuffled training set, for the start."""
        size = min(self.config.batch_size, self.config.abm_samples)
        for indices in shuffled(len(self.train.rows), size, self.config.seed, 0):
            yield self.batch([self.train.rows[k] for k in indices])

    def diagnosis(self, seen: bool) -> list[Batch]:
        """Batches to measure information loss on."""
        batches = diagnosis_batches(len(self.train.rows), self.config.abm_samples, self.config.seed, seen)
        return [self.batch([self.train.rows[k] for k in indices]) for indices in batches]


def prepare(config: InstructConfig, folder: Path, quiet: bool, say: Say) -> Setup:
    """Everything that a run needs before its start.

    Raises:
        ValueError, OSError: of the data, the model, or the adapter, each with one message.
    """
    device = resolve_device(config.device)
    precision = settle_precision(folder, config)
    say(f"device    {device}, {precision}")
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
        say(f"data      {config.data_source}: {len(train.rows)} conversations, {len(held_out.rows)} held out")
    with stage("lora"):
        torch.manual_seed(config.seed)
        targets = config.lora_targets()
        adapted = add_lora(model, config.rank, config.alpha, targets=targets, dropout=config.dropout)
        sha256 = data.digest(conversations)
        setup = Setup(config, adapted, tokenizer, train, held_out, prompts, sha256, weights, device, precision, seconds)
        check_adapters(adapted.eval(), setup.batch(train.rows[:2]))
    return setup


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
