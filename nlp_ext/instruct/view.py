"""Instruction tuning as commands and an analysis see it: the perplexity of held-out answers, where less is better."""

from __future__ import annotations

from abm_vision.runs.epochs import steps_per_epoch
from abm_vision.runs.view import Data, Result, Score, Smoke, View
from nlp_ext import textview
from nlp_ext.instruct.results import KEPT

SUBJECT = "instruct"  # there is one task


def _followed(result: Result) -> dict[str, float]:
    every = steps_per_epoch(result)
    return {str(int(step) / every): value for step, value in result["perplexity_per_step"].items()}


VIEW = View(
    program="abm-instruct",
    name="Instruction tuning",
    kept=KEPT,
    harness="nlp_ext.instruct.harness:HARNESS",
    score=Score(
        key="perplexity",
        name="perplexity",
        split="held-out",
        value=lambda result: result["perplexity"]["after"],
        digits=2,
        higher=False,
        followed=_followed,
        details=lambda result: {key: result["perplexity"][key] for key in ("before", "conversations")},
    ),
    data=Data(
        kinds=textview.kinds("Instruction tuning", "Instruction tuning on stand-ins", (SUBJECT,)),
        kind=textview.kind,
        source=lambda result: result["data"]["held_out"]["source"],
        content=textview.content,
        counted=lambda result: (result["perplexity"]["conversations"],) * 2,
        samples="conversations",
    ),
    smoke=Smoke(
        {
            **{"epochs": 1, "batch_size": 8, "accumulation": 1, "train_examples": 8},
            **{"held_out": 2, "samples": 1, "new_tokens": 4},
        }
    ),
    task=lambda config: SUBJECT,
    circumstances=textview.circumstances,
    asked=textview.ASKED,
)
