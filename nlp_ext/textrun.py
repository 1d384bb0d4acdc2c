"""A run on text: the content that it is made of, its training set as tokens, and its adapter."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedModel, PreTrainedTokenizerBase

from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.abm.restore import evaluate
from abm_vision.runs.content import Origin, initialisation
from abm_vision.runs.harness import Prepared, Run
from abm_vision.runs.settings import AdapterSettings
from nlp_ext.models import Weights, model_content

Row = dict[str, list[int]]  # input_ids and labels of one example
Batch = dict[str, Tensor]


def text_origin(
    config: AdapterSettings, data: Iterable[partial[Origin]], encoding: Callable[..., str], *of: Any
) -> list[partial[Origin]]:
    """What gives the content that a run on text is made of, part by part; nothing is loaded.

    Each raises an OSError if its part is not on this machine.

    Args:
        config: the settings.
        data: parts that give a `split_content`.
        encoding: gives the version, of these things, of what makes tokens of the examples.
        of: its arguments.
    """
    return [
        partial(model_content, config.model),
        *data,
        partial(_encoded, encoding, *of),
        partial(initialisation, config),
    ]


def split_content(split: str, sha256: str) -> Origin:
    """The content of a split, of whose examples this is the hash."""
    return {f"{split} data": f"sha256 {sha256}"}


def _encoded(encoding: Callable[..., str], *of: Any) -> Origin:
    return {"encoding": encoding(*of), "processes": PartialState().num_processes}


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


Made = TypeVar("Made", bound=TextRun)


def adapt(
    kind: type[Made],
    run: Run,
    model: PreTrainedModel,
    origin: Iterable[partial[Origin]],
    scored: Iterable[Row],
    **own: Any,
) -> Made:
    """Add the adapter to a model, and check it on two examples.

    Args:
        kind: class of the run that is made.
        run: the run so far.
        model: with its pretrained weights, on the device.
        origin: parts of the content that it is made of.
        scored: all rows that are scored.
        own: the fields of `kind` that it has from the harness, `rows` and `weights` among them.
    """
    config, rows = run.config, own["rows"]
    with run.stage("lora"):
        found = {name: value for part in origin for name, value in part().items()}
        torch.manual_seed(config.seed)
        adapted = add_lora(model, config.rank, config.alpha, targets=config.lora_targets(), dropout=config.dropout)
        made = kind(
            **vars(run),
            model=adapted,
            samples=len(rows),
            origin={**found, "tokens": token_digest([*rows, *scored])},
            weights_sha256=own["weights"].sha256,
            **own,
        )
        check_adapters(evaluate(adapted), made.batch(rows[:2]))
    return made


def save_tokenizer(run: TextRun, folder: Path) -> None:
    """Write the tokeniser, and the chat template that made the tokens, where `AutoTokenizer` finds them."""
    run.tokenizer.save_pretrained(folder)


def adapter_settings(result: dict[str, Any], kept: Sequence[str], score: str) -> dict[str, Any]:
    """What `abm.json` says of an adapter: these settings of its run, its weights, its score and its initialisation."""
    return {
        "run": {k: result["config"][k] for k in kept},
        "weights": {k: result["weights"][k] for k in ("sha256", "location")},
        score: result[score],
        "report": result["abm"],
    }
