"""transformers' Trainer on the spine: its arguments, every step's loss, checkpoints that are whole."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from abm_vision.abm.bars import watched
from abm_vision.abm.files import CannotWrite, write_json, writing
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Checkpoint, Prepared
from abm_vision.runs.records import AFRESH, Notes, Record, Seconds, read_record
from nlp_ext.results import CHECKPOINTS, NOTES
from nlp_ext.textrun import TextRun

PROGRESS = "progress.json"
Arguments = TypeVar("Arguments", bound=TrainingArguments)


class Kept(Record):
    """`progress.json` of a checkpoint."""

    losses: list[float]
    seconds: list[Seconds]


def training_arguments(kind: type[Arguments], run: TextRun, **options: Any) -> Arguments:
    """The Trainer's arguments for a run: a loss for every step, a checkpoint after every epoch."""
    config = run.config
    arguments = kind(
        output_dir=str(run.folder / CHECKPOINTS),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,  # below 1 it is a share of the steps
        seed=config.seed,
        bf16=run.precision == "bf16",
        use_cpu=run.device.type == "cpu",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="epoch",
        save_total_limit=2,  # the older one goes before the newer one is known to be whole
        disable_tqdm=run.session.quiet or not watched(),
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=run.device.type == "cuda",
        **options,
    )
    if arguments.parallel_mode.name == "NOT_DISTRIBUTED" and arguments.n_gpu > 1:
        arguments._n_gpu = 1  # a run takes one GPU: the Trainer would split batches over all by itself
    return arguments


class Bar(ProgressCallback):
    """The Trainer's progress bar, without a line for every step's loss."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say nothing."""


class Progress(TrainerCallback):
    """Losses and seconds of a run, logged, and kept with every checkpoint; a checkpoint with them is whole."""

    def __init__(self, trainer: Trainer, run: TextRun, checkpoint: Checkpoint | None) -> None:
        self._trainer = trainer
        self.config, self.session = run.config, run.session
        self.losses: list[float] = list(checkpoint.state["losses"]) if checkpoint else []
        self.seconds: list[float] = list(checkpoint.state["seconds"]) if checkpoint else []
        self._began = 0.0

    @property
    def model(self) -> nn.Module:
        """As the Trainer has wrapped it, perhaps spread over processes."""
        return self._trainer.model_wrapped

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
            if self.session.log and state.is_world_process_zero:
                self.session.log("train/loss", self.losses[-1], state.global_step)
                self.session.log("train/lr", logs["learning_rate"], state.global_step)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._began)
        losses = self.losses[self._first :]
        self.session.say(f"epoch {len(self.seconds):3d} loss {sum(losses) / len(losses):.3f}, {self.seconds[-1]:.1f} s")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last file of a checkpoint."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(checkpoint / PROGRESS, {"losses": self.losses, "seconds": self.seconds})


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run that was written whole; halves are removed."""
    whole: list[Path] = []
    for path in (folder / CHECKPOINTS).glob("checkpoint-*"):
        if (path / PROGRESS).is_file():
            whole.append(path)
        else:
            shutil.rmtree(path, ignore_errors=True)  # another process of this run may be at it, too
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def resume(run: Prepared) -> Checkpoint | None:
    """The last whole checkpoint with what was noted of the initialisation, or None.

    Raises:
        ValueError, FileNotFoundError: what lies beside it is damaged or missing.
    """
    place = last_checkpoint(run.folder)
    if place is None:
        return None
    notes = read_record(run.folder / NOTES, Notes, remedy=AFRESH)
    kept = read_record(place / PROGRESS, Kept, remedy=AFRESH)
    return Checkpoint(notes, len(kept["seconds"]), {**kept, "place": place})


def train(trainer: Trainer, run: TextRun, notes: dict[str, Any], checkpoint: Checkpoint | None) -> Progress:
    """Train to the end, from a checkpoint if there is one.

    Raises:
        Diverged: the loss is NaN or infinite.
        CannotWrite: a checkpoint cannot be written.
    """
    if run.processes.main:
        write_json(run.folder / NOTES, notes)
    for printing in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printing)
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Bar)
    trainer.add_callback(progress := Progress(trainer, run, checkpoint))
    place = Path(trainer.args.output_dir)
    try:
        with writing(place):
            trainer.train(resume_from_checkpoint=str(checkpoint.state["place"]) if checkpoint else None)
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error):  # what torch.save raises on a disk that is full
            raise CannotWrite(f"cannot write {place} (no space left?); free space, then run the same again") from error
        raise
    return progress
