"""View: what is known of a harness without loading it: its settings, and what an analysis makes of its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from abm_vision.runs.folder import Kept
from abm_vision.runs.settings import AdapterSettings

Result = dict[str, Any]  # the content of a result.json
STAND_INS = ("rendered", "synthetic")  # sources of data that this package makes itself


@dataclass(frozen=True)
class Published:
    """A row of published results.

    Args:
        method: as the source calls it.
        parameters: trained ones in millions, without the head; None where it is not stated.
        top1: task to %.
        note: how its protocol differs from the official one.
    """

    method: str
    parameters: float | None
    top1: dict[str, float]
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
class View:
    """What commands and an analysis must know of a harness, beyond what is the same for all.

    Args:
        program: name of the command.
        name: of the benchmark, as the title of a report.
        kept: what its runs keep in their folders.
        harness: the `runs.harness.Harness`, which loads a model library, as `module:name`.
        key, score, unit: of the score: in CSV and JSON (`top1`), in words (`top-1`), and its unit.
        split: what is scored, in a word (`test`).
        value: a result's score, as it is recorded.
        higher: whether a higher one is better.
        scale: from the recorded score to its unit.
        digits: decimals of a score in tables.
        limits: of the axis of scores in a figure.
        details: columns of a run in CSV: the score, and what belongs to it.
        counted: number of samples that were scored, and of those in their split.
        samples: what is scored: images, examples.
        subset: what a reader must know of scores on a part of a split.
        selection: settings of a run that is made to choose others, and is no result; empty where all data that could be
            scored for this are scored at the end.
        selection_split: what such a run is scored on, in a word.
        kinds: of data, real ones first.
        kind: name of a result's kind.
        sources: part of the data to where it is from; that of the scored part last.
        content: name to hash of the data's content; empty for records made before results had any.
        seeded: whether the seed draws the data, too, so that their content is that of other runs of one seed alone.
        circumstances: what else must be equal for two results to be comparable, by name.
        asked: settings for which a result says in another field what came of them, or that decide nothing.
        task: name of the task in a configuration.
        groups: task to the group that it belongs to.
        model: the model in words, from a run's settings.
        place: the setting that says where the data are, which commands take without its flag, too; empty for none.
        moment: when a run is scored, in words.
        estimate: how long runs are likely to take, as `module:name` of a function of a configuration like theirs and
            of a folder that may hold finished ones. It returns a function of a configuration to seconds, and in words
            what it is founded on. Empty where that is not known before the data are read.
    """

    program: str
    name: str
    kept: Kept
    harness: str
    key: str
    score: str
    split: str
    unit: str
    value: Callable[[Result], float]
    kinds: tuple[Kind, ...]
    kind: Callable[[Result], str]
    sources: Callable[[Result], Mapping[str, str]]
    content: Callable[[Result], Mapping[str, str]]
    counted: Callable[[Result], tuple[int, int]]
    details: Callable[[Result], Mapping[str, Any]]
    asked: tuple[str, ...]
    samples: str
    subset: str = ""
    higher: bool = True
    scale: float = 1.0
    digits: int = 1
    limits: tuple[float, float] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)
    selection_split: str = ""
    task: Callable[[Mapping[str, Any]], str] = lambda config: config["task"]
    seeded: bool = False
    circumstances: Callable[[Result], Mapping[str, Any]] = lambda result: {}
    groups: Mapping[str, str] = field(default_factory=dict)
    model: Callable[[Mapping[str, Any]], str] = lambda settings: settings["model"]
    place: str = ""
    moment: str = "after its last epoch"
    estimate: str = ""

    @property
    def title(self) -> str:
        """The score in words, with what is scored."""
        return f"{self.split} {self.score}"

    @property
    def label(self) -> str:
        """The same with its unit, as the head of a column."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def points(self) -> str:
        """The unit of a difference of scores, behind its name."""
        return " (points)" if self.unit == "%" else f" ({self.unit})" if self.unit else ""

    @property
    def tasks(self) -> tuple[str, ...]:
        """All tasks, in order."""
        return self.kinds[0].tasks

    def shown(self, result: Result) -> float:
        """The score in its unit."""
        return self.scale * self.value(result)

    def in_words(self, value: float) -> str:
        """A recorded score with its name and unit, such as `top-1 87.50 %`."""
        return f"{self.score} {self.scale * value:.2f} {self.unit}".rstrip()

    @property
    def set_by_suite(self) -> tuple[str, ...]:
        """The settings that a suite sets itself."""
        return ("task", "init", "seed", *self.selection)

    @property
    def config(self) -> type[AdapterSettings]:
        """Class of its configurations."""
        return self.kept.config

    def is_selection(self, config: Mapping[str, Any]) -> bool:
        """Whether a run of these settings is made to choose others."""
        return bool(self.selection) and self.selection.items() <= config.items()

    def task_of(self, result: Result) -> str:
        """The task of a result."""
        return self.task(result["config"])

    def data_of(self, result: Result) -> tuple[Any, ...]:
        """What runs must have in common to be on the same data."""
        return self.task_of(result), result["config"]["seed"] if self.seeded else None

    def source(self, result: Result) -> str:
        """Where the data are from that a result's score is of."""
        return list(self.sources(result).values())[-1]


def stand_in(source: str) -> str:
    """What is said behind a task whose data are no real ones."""
    return f" ({source} data)" if source in STAND_INS else ""
