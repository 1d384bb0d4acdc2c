"""What `result.json` of instruction tuning holds, and what is said of it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from abm_vision.runs.folder import Kept
from abm_vision.runs.markup import markdown
from abm_vision.runs.records import Count, Positive, Record, settings_of
from nlp_ext import results
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.results import CHECKPOINTS, NOTES, TextResult, marks

_TALK = "\n`python -m nlp_ext.instruct chat --adapter path/to/this/folder` talks to it.\n"


class Conversations(Record):
    """What of a part was taken, as sequences."""

    source: str
    conversations: Positive
    sequences: Positive
    cut: Count
    left_out: Count


class Data(Record):
    """What was trained on and held out; the hash is of all conversations."""

    train: Conversations
    held_out: Conversations
    sha256: str


class Perplexity(Record):
    """On the answers of held-out conversations."""

    before: Annotated[float, Field(ge=1)]
    after: Annotated[float, Field(ge=1)]
    conversations: Positive


class Result(TextResult):
    """`result.json` of instruction tuning."""

    config: settings_of(InstructConfig)
    data: Data
    perplexity: Perplexity
    perplexity_per_step: dict[str, Annotated[float, Field(ge=1)]]
    best_step: Positive | None


KEPT = Kept(InstructConfig, Result, unfinished=(NOTES, CHECKPOINTS))


def summary(result: dict[str, Any]) -> str:
    """Kind of data and model, and perplexity."""
    return f"instruct [{marks(result)}]  {perplexity_in_words(result)}"


def perplexity_in_words(result: dict[str, Any]) -> str:
    """Before and after, and of how many conversations."""
    found, steps = result["perplexity"], len(result["loss_per_step"])
    best = f"; step {result['best_step']} of {steps}, the best" if result["best_step"] else ""
    return (
        f"perplexity {found['before']:.2f} before, {found['after']:.2f} after, on the answers of "
        f"{found['conversations']} held-out conversations{best}"
    )


def model_card(result: dict[str, Any]) -> str:
    """What a person needs to know of a saved adapter."""
    config, train = result["config"], result["data"]["train"]
    return results.model_card(
        result,
        tag="instruction-tuning",
        title="tuned on instructions",
        training=f"{train['conversations']} conversations of {markdown(train['source'])}, loss on the answers\nonly, "
        f"seed {config['seed']}. Held-out {perplexity_in_words(result)}.",
        base=f" in {config['base']}",
        loader="AutoModelForCausalLM",
        more=_TALK,
    )
