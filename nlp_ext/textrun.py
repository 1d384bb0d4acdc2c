"""A run on text before its start: the adapted model and the training set as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.runs.content import Origin, initialisation, version
from abm_vision.runs.order import diagnosis_batches, shuffled
from abm_vision.runs.settings import AdapterSettings
from nlp_ext.models import Weights, model_content

Row = dict[str, list[int]]  # input_ids and labels of one example
Batch = dict[str, Tensor]


def text_origin(
    config: AdapterSettings, data: Mapping[str, Callable[[], str]], *encoding: Any
) -> list[Callable[[], Origin]]:
    """What gives the content that a run on text is made of, part by part; nothing is loaded.

    Each raises an OSError if its part is not on this machine.

    Args:
        config: the settings.
        data: split to what gives a hash of its examples.
        encoding: the functions and records that make tokens of them.
    """
    splits = [lambda s=split, digest=digest: {f"{s} data": f"sha256 {digest()}"} for split, digest in data.items()]
    return [
        partial(model_content, config.model),
        *splits,
        lambda: {"encoding": version(*encoding), "processes": PartialState().num_processes},
        partial(initialisation, config),
    ]


def together(parts: Iterable[Callable[[], Origin]]) -> Origin:
    """All parts of an origin."""
    return {name: value for part in parts for name, value in part().items()}


def token_digest(rows: Sequence[Row]) -> str:
    """A hash of all tokens and labels, which tokeniser and template decide as well as the examples."""
    return f"sha256 {hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()}"


@dataclass
class TextRun:
    """What a start needs (`abm_vision.runs.start.Ready`), and a training.

    Args:
        config: the settings.
        model: the adapted model, on its device.
        tokenizer: the model's.
        rows: the training set.
        data: what a result says of the data.
        weights: where the model's weights come from.
        origin: the content that a run that is resumed must find unchanged.
        device, precision: of the run.
        seconds: what the stages took.
    """

    config: AdapterSettings
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    data: dict[str, Any]
    weights: Weights
    origin: Origin
    device: torch.device
    precision: str
    seconds: dict[str, float]

    @property
    def weights_sha256(self) -> str:
        """What a tuned reference must have been tuned on."""
        return self.weights.sha256

    @property
    def backbone(self) -> Backbone:
        """The record of the model's family."""
        return find_backbone(self.model)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Padded tensors (examples, tokens) on the device."""
        collate = DataCollatorForSeq2Seq(self.tokenizer)  # changes the rows that it is given
        return {k: v.to(self.device) for k, v in collate([dict(row) for row in rows]).items() if v is not None}

    def calibration(self) -> Iterator[Batch]:
        """The shuffled training set, for the start."""
        size = min(self.config.batch_size, self.config.abm_samples)
        for indices in shuffled(len(self.rows), size, self.config.seed, 0):
            yield self.batch([self.rows[k] for k in indices])

    def diagnosis(self, seen: bool) -> list[Batch]:
        """Batches to measure information loss on."""
        batches = diagnosis_batches(len(self.rows), self.config.abm_samples, self.config.seed, seen)
        return [self.batch([self.rows[k] for k in indices]) for indices in batches]
