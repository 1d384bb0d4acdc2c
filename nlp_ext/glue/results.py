"""What `result.json` of a run of GLUE holds, and what is said of it."""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict

from abm_vision.runs.folder import Kept
from abm_vision.runs.markup import markdown
from abm_vision.runs.records import Count, Positive, Record, settings_of
from nlp_ext import results
from nlp_ext.glue.config import GlueConfig
from nlp_ext.results import CHECKPOINTS, NOTES, TextResult, marks


class Examples(Record):
    """What of a split was taken."""

    split: str
    source: str
    examples: Positive
    cut: Count
    sha256: str


class Data(Record):
    """What was trained on, and what was scored."""

    train: Examples
    validation: list[Examples]


class Scores(Record):
    """Metrics by name, and what was no label."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]
    count: Positive
    invalid: Count
    invalid_texts: list[str]


class Result(TextResult):
    """`result.json` of a run of GLUE."""

    config: settings_of(GlueConfig)
    data: Data
    scores: dict[str, Scores]


KEPT = Kept(GlueConfig, Result, unfinished=(NOTES, CHECKPOINTS))


def summary(result: dict[str, Any]) -> str:
    """Task, kind of data and model, and scores."""
    return f"{result['config']['task']} [{marks(result)}]  {scores_in_words(result)}"


def scores_in_words(result: dict[str, Any]) -> str:
    """Every metric of every validation split, in per cent, with what was no label."""
    parts = []
    for split, scores in result["scores"].items():
        metrics = [f"{k} {100 * v:.2f}" for k, v in scores.items() if k not in ("invalid", "count", "invalid_texts")]
        no_label = f", {scores['invalid']} no label" if scores["invalid"] else ""
        parts.append(f"{', '.join(metrics)} % of {scores['count']} {split} examples{no_label}")
    return "; ".join(parts)


def model_card(result: dict[str, Any]) -> str:
    """What a person needs to know of a saved adapter."""
    train, task, seed = result["data"]["train"], result["config"]["task"], result["config"]["seed"]
    return results.model_card(
        result,
        tag="t5",
        title=f"adapted to GLUE's {task}",
        training=f"{train['examples']} examples of\n{markdown(train['source'])} as text to text, seed {seed}. "
        f"Validation:\n{scores_in_words(result)}.",
        loader="AutoModelForSeq2SeqLM",
    )
