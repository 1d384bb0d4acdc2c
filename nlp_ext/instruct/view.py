"""Instruction tuning as commands and an analysis see it: the perplexity of held-out answers, where less is better."""

from __future__ import annotations

from abm_vision.analysis.view import View
from nlp_ext import textview
from nlp_ext.instruct.results import KEPT

SUBJECT = "instruct"  # there is one task

VIEW = View(
    program="abm-instruct",
    name="Instruction tuning",
    kept=KEPT,
    harness="nlp_ext.instruct.harness:HARNESS",
    key="perplexity",
    score="perplexity",
    split="held-out",
    unit="",
    higher=False,
    digits=2,
    value=lambda result: result["perplexity"]["after"],
    details=lambda result: {
        "perplexity": result["perplexity"]["after"],
        "before": result["perplexity"]["before"],
        "conversations": result["perplexity"]["conversations"],
    },
    counted=lambda result: (result["perplexity"]["conversations"],) * 2,
    samples="conversations",
    kinds=textview.kinds("Instruction tuning", "Instruction tuning on stand-ins", (SUBJECT,)),
    kind=textview.kind,
    sources=lambda result: {
        "training data": result["data"]["train"]["source"],
        "held-out data": result["data"]["held_out"]["source"],
    },
    content=textview.content,
    circumstances=textview.circumstances,
    asked=textview.ASKED,
    task=lambda config: SUBJECT,
)
