"""A run on text: the content that it is made of, and its training set as tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from abm_vision.runs.content import Origin, initialisation, version
from abm_vision.runs.harness import Prepared
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


@dataclass(kw_only=True)
class TextRun(Prepared):
    """A run on text, with its training set as tokens.

    Args:
        tokenizer: the model's.
        rows: the training set.
        data: what a result says of the data.
        weights: where the model's weights come from.
    """

    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    data: dict[str, Any]
    weights: Weights

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Padded tensors (examples, tokens) on the device."""
        collate = DataCollatorForSeq2Seq(self.tokenizer)  # changes the rows that it is given
        return {k: v.to(self.device) for k, v in collate([dict(row) for row in rows]).items() if v is not None}

    def select(self, indices: Tensor) -> Batch:
        """The training examples at these positions, as `batch` gives them."""
        return self.batch([self.rows[k] for k in indices])

    def recorded(self) -> dict[str, Any]:
        """What a result says of data, model and processes."""
        return {
            "data": self.data,
            "weights": asdict(self.weights),
            "tiny": self.weights.tiny,
            "processes": PartialState().num_processes,
        }


def adapter_settings(result: dict[str, Any], kept: Sequence[str], score: str) -> dict[str, Any]:
    """What `abm.json` says of an adapter: these settings of its run, its weights, its score and its initialisation."""
    return {
        "run": {k: result["config"][k] for k in kept},
        "weights": {k: result["weights"][k] for k in ("sha256", "location")},
        score: result[score],
        "report": result["abm"],
    }
