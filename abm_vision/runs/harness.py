"""What the spine (`runs.run`) is given: what differs between modalities, and how a run is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypedDict

import torch
from peft import PeftModel
from torch import Tensor, nn

from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.runs.content import Origin
from abm_vision.runs.device import resolve_device
from abm_vision.runs.folder import Kept
from abm_vision.runs.log import Log
from abm_vision.runs.order import diagnosis_batches, shuffled
from abm_vision.runs.settings import AdapterSettings

Say = Callable[[str], None]


def silent(line: str) -> None:
    """Say nothing."""


# ------------------------------------------------------------------------------------------------ how a run is run


@dataclass(frozen=True)
class Session:
    """How a run is run: nothing of it changes a result.

    Args:
        out: parent of the run's folder, which `config.run_name()` names.
        rerun: make the run from its beginning even if it is finished or was interrupted.
        quiet: no progress bars.
        diagnose: measure the adapter's information loss before and after its initialisation, on training samples that
            the initialisation does not see, and after it on those that it does; a finished run that lacks it gets it
            added.
        reference_only: the run is made for the sake of another that matches boundaries to it; a report leaves it out,
            until the same run is asked for in its own right.
        extras: names of `Harness.extras` that the finished run is to have as well.
        save_minutes: after so many a run on text saves what it is resumed from, within an epoch, too.
        say: receives a line about every stage.
        log: receives every step's loss and learning rate (see `runs.log`).
    """

    out: str | Path = "results"
    rerun: bool = False
    quiet: bool = True
    diagnose: bool = False
    reference_only: bool = False
    extras: tuple[str, ...] = ()
    save_minutes: float = 10.0
    say: Say = silent
    log: Log | None = None

    def __post_init__(self) -> None:
        if not self.save_minutes > 0:
            raise ValueError(f"save_minutes is {self.save_minutes}; it must be positive")


class SessionOptions(TypedDict, total=False):
    """The fields of `Session` but `out`, as keywords of a harness's `run`."""

    rerun: bool
    quiet: bool
    diagnose: bool
    reference_only: bool
    extras: tuple[str, ...]
    save_minutes: float
    say: Say
    log: Log | None


@dataclass(frozen=True)
class Processes:
    """The processes that make a run together, as one of them sees them. By default it is alone.

    Args:
        main: this is the first process, the only one that writes and speaks.
        count: how many there are.
        wait: returns when all have called it.
        share: gives a model's trained tensors the values that the first process has.
        gather: the trained tensors of a model that is spread over the processes; None: each has the whole model.
    """

    main: bool = True
    count: int = 1
    wait: Callable[[], None] = lambda: None
    share: Callable[[nn.Module], None] = lambda model: None
    gather: Callable[[nn.Module], dict[str, Tensor] | None] = lambda model: None


# ------------------------------------------------------------------------------------------ a run while it is made


@dataclass(kw_only=True)
class Request:
    """A run that is asked for.

    Args:
        config: its settings.
        folder: where its files are.
        session: how it is run.
        processes: that make it.
    """

    config: AdapterSettings
    folder: Path
    session: Session
    processes: Processes


@dataclass(kw_only=True)
class Run(Request):
    """A run while it is made.

    Args:
        device, precision: of all that is computed ("bf16" or "fp32").
        seconds: what its stages have taken.
    """

    device: torch.device
    precision: str
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to `seconds`."""
        began = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began


@dataclass(kw_only=True)
class Prepared(Run):
    """A run before its initialisation. A harness's own adds the data, and what is recorded of them.

    Args:
        model: the adapted model, on the device.
        samples: number of training samples.
        origin: the content that the run is made of, which must be the same when it is resumed.
        weights_sha256: of the pretrained weights; a tuned reference must have been tuned on the same.
    """

    model: PeftModel
    samples: int
    origin: Origin
    weights_sha256: str | None

    @property
    def backbone(self) -> Backbone:
        """The record of the model's family."""
        return find_backbone(self.model)

    def select(self, indices: Tensor) -> Any:
        """The labelled training samples at these positions (n,), as a batch on the device."""
        raise NotImplementedError

    def calibration(self) -> Iterator[Any]:
        """Batches of the shuffled training set from its beginning, for the initialisation."""
        size = min(self.config.batch_size, self.config.abm_samples)
        return map(self.select, shuffled(self.samples, size, self.config.seed, 0))

    def diagnosis(self, seen: bool) -> list[Any]:
        """Batches to measure information loss on: those of the calibration, or some that it does not see."""
        chosen = diagnosis_batches(self.samples, self.config.abm_samples, self.config.seed, seen)
        return [self.select(indices) for indices in chosen]


class Progress(Protocol):
    """How far training is: the loss of every step, the seconds of every whole epoch."""

    losses: list[float]
    seconds: list[float]


@dataclass(frozen=True)
class Checkpoint:
    """What an interrupted run is resumed from.

    Args:
        notes: of its initialisation, a `records.Notes`.
        epoch: whole epochs that it has.
        state: the rest, for the harness that has saved it.
        step: steps that it has, if they end within an epoch.
    """

    notes: dict[str, Any]
    epoch: int
    state: Any
    step: int | None = None


# ------------------------------------------------------------------------------------- what differs between modalities


def _alone(config: AdapterSettings) -> Processes:
    return Processes()


def _nothing_next(result: dict[str, Any]) -> str:
    return ""


def _unread(config: AdapterSettings) -> list[partial[Any]]:
    return []


def _nothing_beside(run: Prepared, folder: Path) -> None:
    """The adapter needs no other files."""


def _unmeasured(run: Prepared, checkpoint: Checkpoint | None) -> Prepared:
    return run


@dataclass(frozen=True)
class Harness:
    """What differs between modalities. Functions of a module, so that a harness can be sent to another process.

    Args:
        kept: the class of a run's settings, `model` among them, the schema of its result, the files of its checkpoints.
        prepare: loads data and pretrained weights and adds the adapter.
        origin: what gives the content that a run of these settings would be made of now, part by part, without a model
            and without the network. A part raises an OSError if it is not there, a ValueError if it is damaged. A suite
            calls equal parts once: functions with arguments that can be hashed.
        data: what reads the data of a run of these settings, part by part, and raises an OSError or a ValueError where
            it cannot. Before a suite makes a run it calls equal parts once, as those of `origin`.
        resume: what an interrupted run left, None if it left nothing.
        train: trains to the end, from the checkpoint if there is one. What it saves on its way holds the notes, which
            `resume` gives back.
        score: the fields of the result that are this harness's own; an analysis reads `weights.sha256`,
            `data.train.source` and what its `View` says.
        summary: what was scored, on which data, and how well, in one line.
        card: the adapter's model card.
        next_steps: what a user can do with a finished run, in lines; none by default.
        settings: what `abm.json` says of the adapter besides.
        beside_adapter: writes what else belongs into the adapter's folder, which it is given.
        leaves: other files that a run leaves.
        extras: file or folder to what makes it of a finished run (see `Session.extras`).
        measure_pretrained: the run with what was measured of the pretrained model, before the adapter is initialised;
            a resumed run finds it in the checkpoint's notes, as `pretrained`, if `train` has put it there.
        device: the device that a setting names.
        processes: those that make the run.
        hushed: a context in which libraries print nothing by themselves, for a command.

    A harness for tables of numbers, say (`tests/test_spine.py` has one whole):

        @dataclass(kw_only=True)
        class TableRun(Prepared):
            table: Tensor  # (samples, columns); the last column is the label

            def select(self, indices):
                return self.table[indices, :-1], self.table[indices, -1].long()

        def prepare(run):
            with run.stage("data"):
                table = load(run.config.data)
            with run.stage("weights"):
                model = add_lora(pretrained(), run.config.rank, run.config.alpha)  # its Backbone is registered
            return TableRun(**vars(run), model=model, table=table, samples=len(table), origin=..., weights_sha256=None)

        def train(run, notes, checkpoint):
            optimiser = AdamW(...)
            progress = checkpoints.restore(run, optimiser, checkpoint)
            while progress.epoch < run.config.epochs:
                ...
                checkpoints.save(run, optimiser, progress, notes)
            return progress

        kept = Kept(TableConfig, TableResult, unfinished=(CHECKPOINT,))
        HARNESS = Harness(kept, prepare, origin, checkpoints.load, train, score, ...)
        run(HARNESS, TableConfig(lr=1e-3), Session(out="results"))
    """

    kept: Kept
    prepare: Callable[[Run], Prepared]
    origin: Callable[[AdapterSettings], list[partial[Origin]]]
    resume: Callable[[Prepared], Checkpoint | None]
    train: Callable[[Prepared, dict[str, Any], Checkpoint | None], Progress]
    score: Callable[[Prepared, Progress], dict[str, Any]]
    summary: Callable[[dict[str, Any]], str]
    card: Callable[[dict[str, Any]], str]
    settings: Callable[[dict[str, Any]], dict[str, Any]]
    data: Callable[[AdapterSettings], list[partial[Any]]] = _unread
    beside_adapter: Callable[[Prepared, Path], None] = _nothing_beside
    leaves: tuple[str, ...] = ()
    extras: Mapping[str, Callable[[Run], None]] = field(default_factory=dict)
    measure_pretrained: Callable[[Prepared, Checkpoint | None], Prepared] = _unmeasured
    next_steps: Callable[[dict[str, Any]], str] = _nothing_next
    device: Callable[[str], torch.device] = resolve_device
    processes: Callable[[AdapterSettings], Processes] = _alone
    hushed: Callable[[], AbstractContextManager[None]] = nullcontext
