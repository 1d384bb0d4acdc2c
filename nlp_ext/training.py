"""What both commands ask of transformers' Trainer: its arguments, every step's loss, checkpoints that are whole."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from abm_vision.runs.start import Say, Tune, check_same_start, start_adapter
from accelerate import PartialState
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from abm_vision import plots
from abm_vision.abm.bars import watched
from abm_vision.abm.files import CannotWrite, write_json, writing
from abm_vision.initializers import get_initializer
from abm_vision.runs import folder as files
from abm_vision.runs.content import check_origin
from abm_vision.runs.device import peak_memory
from abm_vision.runs.folder import ADAPTER, FAILURE, RESULT, Diverged
from abm_vision.runs.log import LOGS, Log
from abm_vision.runs.provenance import environment
from abm_vision.runs.records import Notes, Positive, Record, Result, Seconds, read_record
from abm_vision.runs.settings import AdapterSettings
from nlp_ext.ranks import same_on_all_ranks
from nlp_ext.textrun import TextRun

CHECKPOINTS, PROGRESS, NOTES = "checkpoints", "progress.json", "notes.json"
CURVES, INFORMATION_LOSS = "curves.png", "information_loss.png"
AFRESH = "--rerun, or deleting its folder, starts afresh"
Arguments = TypeVar("Arguments", bound=TrainingArguments)


class Kept(Record):
    """`progress.json` of a checkpoint."""

    losses: list[float]
    seconds: list[Seconds]


class Weights(Record):
    """A `nlp_ext.models.Weights`."""

    location: str
    revision: str | None
    sha256: str
    tiny: bool


class TextResult(Result):
    """What `result.json` of every run on text holds."""

    weights: Weights
    tiny: bool
    processes: Positive


def training_arguments(
    kind: type[Arguments],
    config: AdapterSettings,
    folder: Path,
    device: torch.device,
    precision: str,
    *,
    warmup: float,
    quiet: bool,
    **options: Any,
) -> Arguments:
    """The Trainer's arguments for a run in `folder`: a loss for every step, a checkpoint after every epoch."""
    arguments = kind(
        output_dir=str(folder / CHECKPOINTS),
        num_train_epochs=config.epochs,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=warmup,  # below 1 it is a share of the steps
        seed=config.seed,
        bf16=precision == "bf16",
        use_cpu=device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=2,  # the older one goes before the newer one is known to be whole
        disable_tqdm=quiet or not watched(),
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        **options,
    )
    if arguments.parallel_mode.name == "NOT_DISTRIBUTED" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a run takes one GPU: the Trainer would split batches over all by itself
    return arguments


class Bar(ProgressCallback):
    """The Trainer's progress bar, without a line for every step's loss."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say nothing."""


def own_callbacks(trainer: Trainer) -> Trainer:
    """Take away what prints by itself, and show a bar where bars are on."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
    return trainer


class Progress(TrainerCallback):
    """Losses and seconds of a run, kept with every checkpoint; a checkpoint with them is whole. `log` is told them."""

    def __init__(self, config: AdapterSettings, say: Say, log: Log | None) -> None:
        self.config, self.say, self.log = config, say, log
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self._began = 0.0

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock."""
        self._began, self._first = time.perf_counter(), len(self.losses)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep the loss of a step.

        Raises:
            Diverged: it is NaN or infinite.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise Diverged(
                    f"the training loss is not finite in step {state.global_step}: lower --lr (now {self.config.lr})"
                )
            self.losses.append(float(logs["loss"]))
            if self.log and state.is_world_process_zero:
                self.log("train/loss", self.losses[-1], state.global_step)
                self.log("train/lr", logs["learning_rate"], state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)
        losses = self.losses[self._first :]
        self.say(f"epoch {len(self.seconds):3d} loss {sum(losses) / len(losses):.3f}, {self.seconds[-1]:.1f} s")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last file of a checkpoint."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / PROGRESS, {"losses": self.losses, "seconds": self.seconds})

    def restore(self, checkpoint: Path) -> None:
        """Take up what was kept with a checkpoint."""
        kept = read_record(checkpoint / PROGRESS, Kept, remedy=AFRESH)
        self.losses, self.seconds = kept["losses"], kept["seconds"]


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that was written whole; halves are removed."""
    whole: list[Path] = []
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if (path / PROGRESS).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process of this run may be at it, too
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def begin(
    setup: TextRun, folder: Path, tune: Tune, quiet: bool, diagnose: bool, say: Say
) -> tuple[dict[str, Any], Path | None]:
    """Apply the start, or leave it to the checkpoint that holds all of it. Returns the run's notes and the checkpoint.

    Notes are the report, reference, information loss, seconds and fingerprint of the start, kept in the folder.

    Raises:
        ValueError: the run began with other data or weights, or its start comes out differently now.
    """
    checkpoint = last_checkpoint(folder)
    fresh = {"origin": setup.origin, "information_loss": None}
    notes = read_record(folder / NOTES, Notes, remedy=AFRESH) if checkpoint else fresh
    check_origin(notes["origin"], setup.origin, folder)
    diagnose = diagnose and notes["information_loss"] is None
    if checkpoint is None or diagnose or not get_initializer(setup.config.init).in_factors:
        started = start_adapter(setup, setup.config, tune, setup.seconds, quiet, diagnose, say)
        if PartialState().is_main_process:
            check_same_start(notes, started, folder)
        notes = {"seconds": dict(setup.seconds), **notes, **{k: v for k, v in started.items() if v}}
    same_on_all_ranks(setup.model)
    setup.seconds.update({k: v for k, v in notes["seconds"].items() if k in ("init", "reference")})
    return notes, checkpoint


def common_record(setup: TextRun, notes: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """What every result on text says; `setup.seconds` must be complete."""
    return {
        "schema": setup.config.schema,
        "config": asdict(setup.config),
        "origin": setup.origin,
        "data": setup.data,
        "weights": asdict(setup.weights),
        "tiny": setup.weights.tiny,
        "precision": setup.precision,
        "processes": PartialState().num_processes,
        "trainable_parameters": sum(p.numel() for p in setup.model.parameters() if p.requires_grad),
        "abm": notes.get("report"),
        "reference": notes.get("reference"),
        "information_loss": notes["information_loss"],
        "loss_per_step": progress.losses,
        "seconds_per_epoch": progress.seconds,
        "seconds": setup.seconds,
        "peak_memory_mib": peak_memory(setup.device),
        "environment": environment(str(setup.device)),
    }


def clear(folder: Path, *names: str) -> None:
    """Remove what a run has left in its folder but the configuration; `names` are a command's own files and folders."""
    files.remove(folder, (RESULT, FAILURE, NOTES, CURVES, INFORMATION_LOSS, ADAPTER, CHECKPOINTS, *LOGS, *names))


def finish(result: dict[str, Any], folder: Path, title: str) -> None:
    """Figures, then the last file of a run: with it the run is finished, and what it began with is not needed."""
    if not (folder / CURVES).is_file():
        plots.save_figure(plots.draw_training(result, title), folder / CURVES)
    if result["information_loss"]:
        plots.save_figure(plots.draw_information_loss(result), folder / INFORMATION_LOSS)
    write_json(folder / RESULT, result)
    files.remove(folder, (NOTES, CHECKPOINTS))


def train(trainer: Trainer, progress: Progress, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one.

    Raises:
        Diverged: the loss is NaN or infinite.
        CannotWrite: a checkpoint cannot be written.
    """
    trainer.add_callback(progress)
    if checkpoint:
        progress.restore(checkpoint)
        progress.say(f"resumed   after epoch {len(progress.seconds)} of {progress.config.epochs}")
    place = Path(trainer.args.output_dir)
    try:
        with writing(place):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error):  # what torch.save raises on a disk that is full
            raise CannotWrite(f"cannot write {place} (no space left?); free space, then run the same again") from error
        raise
