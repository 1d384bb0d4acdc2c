"""A run of GLUE before its start: examples, model, tokeniser, adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from abm_vision.runs.start import Say, settle_device, stopwatch
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.runs.content import Origin
from abm_vision.runs.order import shuffled
from nlp_ext.glue import data
from nlp_ext.glue.config import GlueConfig
from nlp_ext.glue.tasks import GlueTask, get_task
from nlp_ext.models import load_model
from nlp_ext.ranks import text_device
from nlp_ext.textrun import Row, TextRun, text_origin, together, token_digest

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Split:
    """Examples as tokens: `rows` with input_ids and labels, and what was cut."""

    name: str
    examples: Dataset
    rows: list[Row]
    cut: int

    def record(self, source: str) -> dict[str, Any]:
        """What a result says of it; the hash is of all its texts and labels."""
        digest = data.digest(self.examples)
        return {"split": self.name, "source": source, "examples": len(self.rows), "cut": self.cut, "sha256": digest}


@dataclass
class Setup(TextRun):
    """The adapted model and its data."""

    config: GlueConfig
    task: GlueTask
    validation: list[Split]


def prepare(config: GlueConfig, folder: Path, quiet: bool, say: Say) -> Setup:
    """Everything that a run needs before its start.

    Raises:
        ValueError, OSError: of the data, the model, or the adapter, each with one message.
    """
    device = text_device(config.device)
    precision = settle_device(device, config, folder, say)
    seconds: dict[str, float] = {}
    stage = stopwatch(seconds)
    task = get_task(config.task)
    with stage("weights"):
        model, tokenizer, weights = load_model(
            config.model, AutoModelForSeq2SeqLM, "tiny-t5", show_progress_bar=not quiet, dtype=torch.float32
        )
        say(f"weights   {weights}")
    with stage("data"):
        train = read_split(config, "train", tokenizer)
        validation = [read_split(config, split, tokenizer) for split in task.validation]
        count = " and ".join(f"{len(split.rows)} of {split.name}" for split in validation)
        say(f"data      {config.data_source}: {len(train.rows)} training examples, {count}")
    with stage("lora"):
        torch.manual_seed(config.seed)
        targets = config.lora_targets()
        adapted = add_lora(model.to(device), config.rank, config.alpha, targets=targets, dropout=config.dropout)
        record = {
            "train": train.record(config.data_source),
            "validation": [split.record(config.data_source) for split in validation],
        }
        splits = (train, *validation)
        digests = {split["split"]: partial(str, split["sha256"]) for split in (record["train"], *record["validation"])}
        tokens = token_digest([row for split in splits for row in split.rows])
        origin = {**together(text_origin(config, digests, encode, task)), "tokens": tokens}
        setup = Setup(
            config,
            adapted,
            tokenizer,
            train.rows,
            record,
            weights,
            origin,
            device,
            precision,
            seconds,
            task,
            validation,
        )
        check_adapters(adapted.eval(), setup.batch(train.rows[:2]))
    return setup


def origin_parts(config: GlueConfig) -> list[Callable[[], Origin]]:
    """What gives the content that a run of this configuration would be made of now, but for its tokens."""
    task = get_task(config.task)
    digests = {name: lambda name=name: data.digest(_examples(config, name)) for name in ("train", *task.validation)}
    return text_origin(config, digests, encode, task)


def read_split(config: GlueConfig, name: str, tokenizer: PreTrainedTokenizerBase) -> Split:
    """The examples of a split that the configuration asks for, as tokens.

    A training set that is not taken whole is the first part of the shuffled one; of validation it is the first part.
    Test splits are always whole, and have no labels.
    """
    examples = _examples(config, name)
    rows, cut = encode(get_task(config.task), examples, tokenizer, config.source_tokens, not name.startswith("test"))
    return Split(name, examples, rows, cut)


def _examples(config: GlueConfig, name: str) -> Dataset:
    examples = data.read(get_task(config.task), name, config.data_source)
    most = {"train": config.train_examples, "validation": config.validation_examples}.get(name.partition("_")[0], 0)
    if name == "train":
        (order,) = shuffled(len(examples), len(examples), config.seed, 0)
        return examples.select(order[: most or None].tolist())
    return examples.select(range(most)) if 0 < most < len(examples) else examples


def encode(
    task: GlueTask, examples: Dataset, tokenizer: PreTrainedTokenizerBase, source_tokens: int, labelled: bool
) -> tuple[list[Row], int]:
    """Examples as input_ids and, if there are any, labels; and how many inputs were cut."""
    sources = tokenizer([task.source(example) for example in examples], verbose=False).input_ids
    cut = sum(len(ids) > source_tokens for ids in sources)
    rows = [{"input_ids": shortened(ids, source_tokens)} for ids in sources]
    if labelled:
        targets = tokenizer([task.target(label) for label in examples["label"]]).input_ids
        rows = [{**row, "labels": target} for row, target in zip(rows, targets, strict=True)]
    return rows, cut


def shortened(ids: list[int], length: int) -> list[int]:
    """The first tokens and the last, which is the end of the text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def target_length(task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest answer, its end included."""
    answers = task.labels or tuple(f"{k / 5:.1f}" for k in range(26))
    return max(len(ids) for ids in tokenizer(list(answers)).input_ids)
