"""transformers' Trainer on the spine: its arguments, every step's loss, checkpoints that are whole."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from abm_vision.abm.bars import watched
from abm_vision.abm.files import CannotWrite, write_json, writing
from abm_vision.runs.checkpoint import trained
from abm_vision.runs.estimate import TimeLeft
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Checkpoint, Prepared
from abm_vision.runs.records import AFRESH, Notes, Record, Seconds, read_record
from nlp_ext.ranks import as_the_first
from nlp_ext.results import CHECKPOINTS, NOTES
from nlp_ext.textrun import TextRun

PROGRESS, BEST = "progress.json", "best.safetensors"
Arguments = TypeVar("Arguments", bound=TrainingArguments)


class Kept(Record):
    """`progress.json` of a checkpoint; `running` are the seconds of an epoch that is not whole."""

    losses: list[float]
    seconds: list[Seconds]
    running: Seconds
    perplexities: dict[str, float]


@dataclass(frozen=True)
class Follow:
    """The perplexity during the training.

    Args:
        measure: takes the model, as the Trainer has wrapped it.
        every: so many steps, and after the last one.
        best: keep the weights with the lowest, instead of the last ones.
    """

    measure: Callable[[nn.Module], float]
    every: int
    best: bool


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
    """Losses, seconds and perplexities of a run, logged, and kept with every checkpoint; one with them is whole."""

    def __init__(self, trainer: Trainer, run: TextRun, checkpoint: Checkpoint | None, follow: Follow | None) -> None:
        self._trainer, self._run, self._follow = trainer, run, follow
        state = checkpoint.state if checkpoint else {"losses": [], "seconds": [], "running": 0.0, "perplexities": {}}
        self.losses: list[float] = list(state["losses"])
        self.seconds: list[float] = list(state["seconds"])
        self.perplexities: dict[int, float] = {int(k): v for k, v in state["perplexities"].items()}
        self.best: dict[str, Tensor] = state.get("best", {})
        self.steps_per_epoch = _bound_steps(trainer, run.config.max_steps)
        self._running: float = state["running"]
        self._began: float | None = None  # between epochs
        self._saved = time.monotonic()

    @property
    def model(self) -> nn.Module:
        """As the Trainer has wrapped it, perhaps spread over processes."""
        return self._trainer.model_wrapped

    @property
    def kept_step(self) -> int:
        """The step after which the weights were as they are kept."""
        return best_step(self.perplexities) if self._follow and self._follow.best else len(self.losses)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The number of steps is known now."""
        self._time_left = TimeLeft(state.max_steps - state.global_step, self._run.session.say)

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock, where an interrupted epoch has stopped it."""
        self._began, self._running = time.perf_counter() - self._running, 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save if it is time; the end of an epoch and that of the training are no places for it."""
        due = time.monotonic() - self._saved >= 60 * self._run.session.save_minutes
        within = state.global_step % self.steps_per_epoch and state.global_step < state.max_steps
        control.should_save = bool(within) and as_the_first(due)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Keep the loss of a step, and measure the perplexity where it is followed.

        Raises:
            Diverged: it is NaN or infinite.
        """
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise Diverged(
                f"the training loss is not finite in step {state.global_step}: lower --lr (now {self._run.config.lr})"
            )
        self.losses.append(float(logs["loss"]))
        self._log("train/loss", self.losses[-1])
        self._log("train/lr", logs["learning_rate"])
        self._time_left.step(lambda: None)  # the loss is on the host
        if self._follow and (state.global_step % self._follow.every == 0 or state.global_step == state.max_steps):
            self._measure(self._follow)

    def _log(self, name: str, value: float) -> None:
        if self._run.session.log and self._run.processes.main:
            self._run.session.log(name, value, len(self.losses))

    def _measure(self, follow: Follow) -> None:
        """The clock of the epoch stands still meanwhile."""
        began, step = time.perf_counter(), len(self.losses)
        with self._run.stage("perplexity"):
            self.perplexities[step] = follow.measure(self.model)
        if follow.best and best_step(self.perplexities) == step:
            self.best = {name: tensor.clone() for name, tensor in trained(self._run.model).items()}
        self._log("val/perplexity", self.perplexities[step])
        self._run.session.say(f"step {step:5d} perplexity of held-out answers {self.perplexities[step]:.2f}")
        self._began += (taken := time.perf_counter() - began)
        self._time_left.skip(taken)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop the clock. A last epoch that is not whole is not saved: the Trainer would resume it beyond its end."""
        losses = self.losses[len(self.seconds) * self.steps_per_epoch :]
        self.seconds.append(time.perf_counter() - self._began)
        self._began = None
        if state.global_step % self.steps_per_epoch:
            control.should_save = False
        self._run.session.say(
            f"epoch {len(self.seconds):3d} loss {sum(losses) / len(losses):.3f}, {self.seconds[-1]:.1f} s"
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last files of a checkpoint."""
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.best:
                save_file(self.best, checkpoint / BEST)
            running = 0.0 if self._began is None else time.perf_counter() - self._began
            perplexities = {str(step): value for step, value in self.perplexities.items()}
            kept = {"losses": self.losses, "seconds": self.seconds, "running": running, "perplexities": perplexities}
            write_json(checkpoint / PROGRESS, kept)
        self._saved = time.monotonic()

    @torch.no_grad()
    def restore_best(self) -> None:
        """Leave the model as it was when its perplexity was lowest, if that is to be kept."""
        for name, tensor in trained(self._run.model).items() if self.best else ():
            tensor.copy_(self.best[name])


def best_step(perplexities: dict[int, float]) -> int:
    """The step with the lowest perplexity, of several the last."""
    return min(perplexities, key=lambda step: (perplexities[step], -step))


def _bound_steps(trainer: Trainer, most: int) -> int:
    """Let the Trainer end after so many steps (0: all epochs), its schedule with it; returns the steps of an epoch."""
    epochs, steps, *_ = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())
    if 0 < most < epochs * steps:
        trainer.args.max_steps = most
    return steps


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
    best = load_file(place / BEST, device=str(run.device)) if (place / BEST).is_file() else {}
    step = len(kept["losses"]) if kept["running"] else None
    return Checkpoint(notes, len(kept["seconds"]), {**kept, "place": place, "best": best}, step)


def train(
    trainer: Trainer,
    run: TextRun,
    notes: dict[str, Any],
    checkpoint: Checkpoint | None,
    follow: Follow | None = None,
) -> Progress:
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
    trainer.add_callback(progress := Progress(trainer, run, checkpoint, follow))
    place = Path(trainer.args.output_dir)
    try:
        with writing(place):
            trainer.train(resume_from_checkpoint=str(checkpoint.state["place"]) if checkpoint else None)
    except RuntimeError as error:
        if "PytorchStreamWriter" in str(error):  # what torch.save raises on a disk that is full
            raise CannotWrite(f"cannot write {place} (no space left?); free space, then run the same again") from error
        raise
    progress.restore_best()
    return progress
