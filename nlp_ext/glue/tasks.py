"""The nine tasks of GLUE (arXiv:1804.07461) as text to text, after T5 (arXiv:1910.10683, appendix D)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from abm_vision.abm.arguments import nearest

INVALID = None  # the prediction of a text that is no label


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: configuration of `nyu-mll/glue`, and the first word of T5's inputs.
        columns: the columns that are read, in T5's order.
        labels: the texts of labels 0, 1, ...; empty for a score from 0 to 5.
        scores: names of the metrics, the main one first.
        server: file name for the GLUE server of every test split.
        answers: form of the predictions in that file: "text" or "number".
        sizes: number of examples of every split.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    scores: tuple[str, ...]
    server: Mapping[str, str]
    answers: str
    sizes: Mapping[str, int]

    @property
    def validation(self) -> tuple[str, ...]:
        """Names of the validation splits; MNLI has two."""
        return tuple(split for split in self.sizes if split.startswith("validation"))

    def source(self, example: Mapping[str, str]) -> str:
        """Write the model's input, e.g. "rte sentence1: ... sentence2: ..."."""
        return " ".join([self.name, *(f"{column}: {example[column]}" for column in self.columns)])

    def target(self, label: int | float) -> str:
        """Write the model's target. A score is rounded to the nearest 0.2, as T5 does.

        Raises:
            ValueError: the task has no such label.
        """
        if not self.labels:
            if not 0 <= label <= 5:
                raise ValueError(f"{self.name} has the score {label}; it must lie in 0 .. 5")
            return f"{round(5 * label) / 5:.1f}"
        if label not in range(len(self.labels)):
            known = ", ".join(f"{k} ({text})" for k, text in enumerate(self.labels))
            raise ValueError(f"{self.name} has the label {label}; allowed are {known}")
        return self.labels[int(label)]

    def read(self, text: str) -> int | float | None:
        """Read the label from a text; `INVALID` (None) if it is none."""
        text = text.strip()
        if self.labels:
            return self.labels.index(text) if text in self.labels else INVALID
        return float(text) if re.fullmatch(r"[0-5](\.\d+)?", text) and float(text) <= 5 else INVALID


def _pair(
    name: str,
    columns: tuple[str, str],
    labels: Sequence[str],
    scores: Sequence[str],
    file: str,
    answers: str,
    sizes: tuple[int, int, int],
) -> GlueTask:
    return GlueTask(name, columns, tuple(labels), tuple(scores), {"test": f"{file}.tsv"}, answers, _three(*sizes))


def _three(train: int, validation: int, test: int) -> dict[str, int]:
    return {"train": train, "validation": validation, "test": test}


_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

TASKS: Mapping[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask(
            "cola",
            ("sentence",),
            ("unacceptable", "acceptable"),
            ("matthews",),
            {"test": "CoLA.tsv"},
            "number",
            _three(8551, 1043, 1063),
        ),
        GlueTask(
            "mnli",
            ("hypothesis", "premise"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            # The diagnostic set (AX) is answered by MNLI's model.
            {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv", "test_ax": "AX.tsv"},
            "text",
            {
                "train": 392_702,
                "validation_matched": 9815,
                "validation_mismatched": 9832,
                "test_matched": 9796,
                "test_mismatched": 9847,
                "test_ax": 1104,
            },
        ),
        _pair(
            "mrpc",
            _SENTENCES,
            ("not_equivalent", "equivalent"),
            ("f1", "accuracy"),
            "MRPC",
            "number",
            (3668, 408, 1725),
        ),  # fmt: skip
        _pair("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), "QNLI", "text", (104_743, 5463, 5463)),
        _pair(
            "qqp",
            ("question1", "question2"),
            ("not_duplicate", "duplicate"),
            ("f1", "accuracy"),
            "QQP",
            "number",
            (363_846, 40_430, 390_965),
        ),  # fmt: skip
        _pair("rte", _SENTENCES, _ENTAILMENT, ("accuracy",), "RTE", "text", (2490, 277, 3000)),
        GlueTask(
            "sst2",
            ("sentence",),
            ("negative", "positive"),
            ("accuracy",),
            {"test": "SST-2.tsv"},
            "number",
            _three(67_349, 872, 1821),
        ),
        _pair("stsb", _SENTENCES, (), ("pearson", "spearman"), "STS-B", "number", (5749, 1500, 1379)),
        _pair("wnli", _SENTENCES, ("not_entailment", "entailment"), ("accuracy",), "WNLI", "number", (635, 71, 146)),
    )
}


def get_task(name: str) -> GlueTask:
    """Look up a task by its name.

    Raises:
        ValueError: there is no such task; the message has the nearest names.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; allowed are {', '.join(TASKS)}{nearest(name, TASKS)}")
    return TASKS[name]
