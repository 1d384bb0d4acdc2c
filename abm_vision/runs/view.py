"""View: what is known of a harness without loading it: its settings, its score, and what its data are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abm_vision.initializers import BASELINE
from abm_vision.runs.folder import Kept
from abm_vision.runs.settings import AdapterSettings

Result = dict[str, Any]  # the content of a result.json
STAND_INS = ("rendered", "synthetic")  # sources of data that this package makes itself


# ------------------------------------------------------------------------------------------------------- the score


@dataclass(frozen=True)
class Score:
    """What a run is scored by.

    Args:
        key: its name in CSV and JSON (`top1`).
        name: in words (`top-1`).
        split: what is scored, in a word (`test`).
        value: a result's score, as it is recorded.
        unit: none for a bare number.
        scale: from the recorded score to its unit.
        digits: decimals in tables.
        higher: whether a higher one is better.
        followed: epoch to score, as it is recorded, where it was measured during the training.
        details: what belongs to it, as further columns of a run in CSV.
        moment: when a run is scored, in words.
    """

    key: str
    name: str
    split: str
    value: Callable[[Result], float]
    unit: str = ""
    scale: float = 1.0
    digits: int = 1
    higher: bool = True
    followed: Callable[[Result], Mapping[str, float]] = lambda result: {}
    details: Callable[[Result], Mapping[str, Any]] = lambda result: {}
    moment: str = "after its last epoch"

    @property
    def title(self) -> str:
        """The score in words, with what is scored."""
        return f"{self.split} {self.name}"

    @property
    def label(self) -> str:
        """The same with its unit, as the head of a column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def points(self) -> str:
        """The unit of a difference of scores, behind its name."""
        return " (points)" if self.unit == "%" else f" ({self.unit})" if self.unit else ""

    @property
    def difference(self) -> str:
        """The label of an axis of differences to a baseline."""
        return f"difference to {BASELINE}{self.points}{'' if self.higher else ', less is better'}"

    def shown(self, result: Result) -> float:
        """A result's score in its unit."""
        return self.scale * self.value(result)

    def in_words(self, value: float) -> str:
        """A recorded score with its name and unit, such as `top-1 87.50 %`."""
        return f"{self.name} {self.scale * value:.2f} {self.unit}".rstrip()

    def columns(self, result: Result) -> dict[str, Any]:
        """The score and its details, as columns of a run in CSV."""
        return {self.key: self.value(result), **self.details(result)}


# -------------------------------------------------------------------------------------------------------- the data


@dataclass(frozen=True)
class Published:
    """A row of published results.

    Args:
        method: as the source calls it.
        parameters: trained ones in millions, without the head; None where it is not stated.
        scores: task to score, in the score's unit.
        note: how its protocol differs from the official one.
    """

    method: str
    parameters: float | None
    scores: dict[str, float]
    note: str


@dataclass(frozen=True)
class Mean:
    """A mean over tasks, or over the means of groups of tasks.

    Args:
        name: short, as the head of a column.
        title: as a line of a table.
        parts: the groups of tasks; one for a plain mean.
        whole: it is shown only where every task is there, since a part would mislead.
    """

    name: str
    title: str
    parts: tuple[tuple[str, ...], ...]
    whole: bool = False


@dataclass(frozen=True)
class Kind:
    """Data of one kind, real or a stand-in, which no average mixes with another.

    Args:
        name: in a word, as a tag.
        title: of its tables and figures.
        tasks: all that there are.
        means: the means over them.
        published: what others measured on them.
        note: what a reader must know.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    means: tuple[Mean, ...] = ()
    published: tuple[Published, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Data:
    """What runs are trained and scored on.

    Args:
        kinds: of data, real ones first; the tasks of the first are all that there are.
        source: where the data are from that a result's score is of.
        counted: number of samples that were scored, and of those in their split.
        samples: what these are: images, examples.
        kind: name of a result's kind.
        content: name to hash of the data's content.
        seeded: whether the seed draws the data, too, so that their content is that of other runs of one seed alone.
        subset: what a reader must know of scores on a part of a split.
    """

    kinds: tuple[Kind, ...]
    source: Callable[[Result], str]
    counted: Callable[[Result], tuple[int, int]]
    samples: str
    kind: Callable[[Result], str] = lambda result: "real"
    content: Callable[[Result], Mapping[str, str]] = lambda result: {}
    seeded: bool = False
    subset: str = ""


def stand_in(source: str) -> str:
    """What is said behind a task whose data are no real ones."""
    return f" ({source} data)" if source in STAND_INS else ""


# ----------------------------------------------------------------------------------------------------- the harness


@dataclass(frozen=True)
class Selection:
    """How runs are made to choose others' settings, which are no results.

    Args:
        settings: that make a run one of these; empty where all data that could be scored for it are scored at the end.
        split: what they are scored on, in a word.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    split: str = ""


@dataclass(frozen=True)
class Smoke:
    """How a run is made to see whether it can be: one step on a handful of samples.

    Args:
        settings: that make it so short.
        harness: one that takes as few training samples, as `module:name`; empty where the settings do that.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    harness: str = ""


@dataclass(frozen=True)
class View:
    """What commands and an analysis must know of a harness, beyond what is the same for all.

    Args:
        program: name of the command, `abm-NAME` where `NAME-1` is the schema of its results.
        name: of the benchmark, as the title of a report.
        kept: what its runs keep in their folders.
        harness: the `runs.harness.Harness`, which loads a model library, as `module:name`.
        score: what its runs are scored by.
        data: what they are trained and scored on.
        selection: how runs are made that choose settings.
        smoke: how runs are made to see whether they can be; without settings there are none.
        task: name of the task in a configuration.
        groups: task to the group that it belongs to.
        model: the model in words, from a run's settings.
        circumstances: what else must be equal for two results to be comparable, by name.
        asked: settings for which a result says in another field what came of them, or that decide nothing.
        place: the setting that says where the data are, which commands take without its flag, too; empty for none.
        estimate: how long runs are likely to take, as `module:name` of a function of a configuration like theirs and
            of a folder that may hold finished ones. It returns a function of a configuration to seconds, and in words
            what it is founded on. Empty where that is not known before the data are read.

    That of the harness for tables of numbers in `Harness`, whose results have an `accuracy` and a number of `rows`
    (`tests/test_spine.py` has it whole), and its commands, `suite`, `compare` and `report` among them:

        VIEW = View(
            program="abm-table",
            name="Tables",
            kept=KEPT,
            harness="my.tables:HARNESS",
            score=Score("accuracy", "accuracy", "test", value=lambda result: result["accuracy"], unit="%", scale=100.0),
            data=Data(
                kinds=(Kind("real", "Tables", tasks=("table",)),),
                source=lambda result: result["data"]["test"]["source"],
                counted=lambda result: (result["rows"], result["rows"]),
                samples="rows",
            ),
            task=lambda config: "table",
        )
        COMMANDS = commands_of(VIEW, "Train a network on a table.", {})  # see `runs.commands`
    """

    program: str
    name: str
    kept: Kept
    harness: str
    score: Score
    data: Data
    selection: Selection = Selection()
    smoke: Smoke = Smoke()
    task: Callable[[Mapping[str, Any]], str] = lambda config: config["task"]
    groups: Mapping[str, str] = field(default_factory=dict)
    model: Callable[[Mapping[str, Any]], str] = lambda settings: settings["model"]
    circumstances: Callable[[Result], Mapping[str, Any]] = lambda result: {}
    asked: tuple[str, ...] = ()
    place: str = ""
    estimate: str = ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, in order."""
        return self.data.kinds[0].tasks

    @property
    def config(self) -> type[AdapterSettings]:
        """Class of its configurations."""
        return self.kept.config

    @property
    def set_by_suite(self) -> tuple[str, ...]:
        """The settings that a suite sets itself."""
        return ("task", "init", "seed", *self.selection.settings)

    def is_selection(self, config: Mapping[str, Any]) -> bool:
        """Whether a run of these settings is made to choose others."""
        return bool(self.selection.settings) and self.selection.settings.items() <= config.items()

    def task_of(self, result: Result) -> str:
        """The task of a result."""
        return self.task(result["config"])

    def sources(self, result: Result) -> dict[str, str]:
        """Part of the data to where it is from."""
        return {
            "training data": result["data"]["train"]["source"],
            f"{self.score.split} data": self.data.source(result),
        }

    def data_of(self, result: Result) -> tuple[Any, ...]:
        """What runs must have in common to be on the same data."""
        return self.task_of(result), result["config"]["seed"] if self.data.seeded else None
