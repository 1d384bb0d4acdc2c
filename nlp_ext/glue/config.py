"""GlueConfig: the settings of a run of GLUE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from abm_vision.abm.settings import flag
from abm_vision.runs.settings import AdapterSettings, at_least
from nlp_ext.glue.data import HUB, SYNTHETIC
from nlp_ext.glue.tasks import TASKS, get_task

SCHEMA = "glue-3"
# What a preset sets beyond the defaults. `paper` is the reference recipe of ABM-LoRA on T5-Base (arXiv:2511.19145).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {},
    "paper": {
        "model": "google-t5/t5-base",
        "alpha": 16.0,
        "dropout": 0.05,
        "abm_lr": 3e-4,
        "abm_steps": 100,
        "abm_max_tokens": 100_000,  # all of its samples
        "abm_batch_size": 1,
        "abm_layers": "6",
        "epochs": 8,
        "lr": 1e-4,
        "weight_decay": 0.01,
        "train_examples": 0,
        "validation_examples": 0,
    },
}


@dataclass(frozen=True)
class _First:
    """The fields that help and listings begin with."""

    task: str = flag("sst2", f"GLUE task: {', '.join(TASKS)}")
    preset: str = flag(
        "quick", "quick (a tiny model, made-up data) or paper (the recipe of ABM-LoRA's paper)", choices=tuple(PRESETS)
    )
    model: str = flag("tiny-t5", "T5 on the hub, such as google-t5/t5-base, a folder, or tiny-t5, which is made here")
    data: str = flag(
        "auto",
        f"hub ({HUB}), {SYNTHETIC} (a small grammar; not GLUE), or a folder of files in GLUE's columns; auto: "
        f"{SYNTHETIC} for tiny-t5, else hub",
    )


@dataclass(frozen=True)
class GlueConfig(AdapterSettings, _First):
    """The settings of one run. Every field is a flag of the command line; the defaults are the `quick` preset.

    Raises:
        ValueError: a field is out of its range.
    """

    schema: ClassVar[str] = SCHEMA
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    epochs: int = flag(6, "training epochs")
    max_steps: int = flag(0, "end after so many training steps, the learning rate with them; 0: all epochs")
    batch_size: int = flag(32, "examples in a training step")
    train_examples: int = flag(2000, "training examples, the first of the shuffled split; 0, or fewer in it: all")
    validation_examples: int = flag(2000, "most examples of a validation split, the first; 0: all")
    source_tokens: int = flag(512, "longest input in tokens; longer ones are cut, and counted in the result")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        get_task(self.task)
        at_least("train_examples validation_examples max_steps".split(), self, 0)
        at_least(["source_tokens"], self, 8)

    @property
    def subject(self) -> str:
        """The task."""
        return self.task

    @property
    def data_source(self) -> str:
        """`data`, decided."""
        from nlp_ext import tiny  # loads transformers

        if self.data != "auto":
            return self.data
        return SYNTHETIC if self.model in tiny.MODELS else "hub"
