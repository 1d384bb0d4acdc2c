"""A run on text before its start: the adapted model and the training set as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.runs.order import diagnosis_batches, shuffled
from abm_vision.runs.settings import AdapterSettings
from nlp_ext.models import Weights

Row = dict[str, list[int]]  # input_ids and labels of one example
Batch = dict[str, Tensor]


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
        device, precision: of the run.
        seconds: what the stages took.
    """

    config: AdapterSettings
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    data: dict[str, Any]
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
        """The record of the model's family."""
        return find_backbone(self.model)

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that is taken up again must find unchanged."""
        return {
            "data": self.data,
            "weights_sha256": self.weights.sha256,
            "processes": PartialState().num_processes,
        }

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
