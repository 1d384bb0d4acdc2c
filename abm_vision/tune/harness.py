"""One's own images for the spine (`runs.run`): data and model, training with the best epoch kept, and the score."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from abm_vision.images.answers import ANSWERS, Answers, answer, sample, write_answers
from abm_vision.images.data import Images, Preprocessing, Stream, load_all
from abm_vision.images.description import of_run
from abm_vision.images.model import adapted, found_weights, pretrained, weights_origin
from abm_vision.images.train import make_optimiser
from abm_vision.images.train import train as train_epochs
from abm_vision.runs import checkpoint as checkpoints
from abm_vision.runs.checkpoint import Progress
from abm_vision.runs.content import Origin, initialisation
from abm_vision.runs.harness import Checkpoint, Harness, Prepared, Run, Session, SessionOptions
from abm_vision.runs.order import DIAGNOSIS_BATCH, DIAGNOSIS_SAMPLES, shuffled
from abm_vision.runs.run import run as run_spine
from abm_vision.tune.augment import Augmented
from abm_vision.tune.config import TuneConfig
from abm_vision.tune.data import Dataset, load
from abm_vision.tune.results import KEPT, model_card, next_steps, summary
from abm_vision.weights import WeightSource

if TYPE_CHECKING:
    from typing_extensions import Unpack


def run(config: TuneConfig, out: str | Path = "results", **session: Unpack[SessionOptions]) -> dict[str, Any]:
    """Adapt a pretrained ViT to one's own images, keep the epoch that is best on validation, and write all under `out`.

    An interrupted run is resumed with the same result, bit for bit on CPU. A test part is opened once, at the end.

    `out` is the parent of the run's folder; `session` are the other fields of `abm_vision.runs.harness.Session`, such
    as rerun, diagnose, say and log. What is returned and raised is that of `abm_vision.runs.run.run`.
    """
    return run_spine(HARNESS, config, Session(out, **session))


@dataclass(kw_only=True)
class TuneRun(Prepared):
    """A run on one's own images.

    Args:
        images: to train on.
        validation: uint8 images (n, 3, size, size) and labels (n,) in memory, to choose the epoch by.
        dataset: where they are from.
        preprocessing: what the model expects.
        weights: where they are from.
    """

    config: TuneConfig
    images: Images
    validation: Images
    dataset: Dataset
    preprocessing: Preprocessing
    weights: WeightSource

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float images (n, 3, size, size), labels (n,)) of training images at these positions."""
        return self.images.select(indices)

    def diagnosis(self, seen: bool) -> list[tuple[Tensor, Tensor]]:
        """Batches to measure information loss on: those of the calibration, or validation images, 64 at most."""
        if not seen:
            order = shuffled(len(self.validation), DIAGNOSIS_BATCH, self.config.seed, 0)
            return [self.validation.select(indices) for indices in order[: DIAGNOSIS_SAMPLES // DIAGNOSIS_BATCH]]
        (order,) = shuffled(self.samples, self.samples, self.config.seed, 0)
        return [self.select(indices) for indices in order[: self.config.abm_samples].split(DIAGNOSIS_BATCH)]


def prepare(run: Run) -> TuneRun:
    """Data, pretrained weights and the adapted model.

    Raises:
        ValueError, OSError, WeightsNotFound: of the data, the weights, or the adapter, each with one message.
    """
    config, say = run.config, run.session.say
    with run.stage("data"):
        dataset = _load(config)
        parts = ", ".join(f"{len(split)} {part}" for part, split in dataset.splits.items())
        say(f"data      {config.data}: {len(dataset.classes)} classes; {parts} images")
        for note in dataset.notes:
            say(f"          {note}")
    backbone, weights, preprocessing = pretrained(run, len(dataset.classes))
    with run.stage("data"):
        in_memory = partial(load_all, preprocessing=preprocessing, workers=config.workers)
        validation = Images(*in_memory(dataset.validation), preprocessing, run.device)
        if config.augment == "none":
            images = Images(*in_memory(dataset.train), preprocessing, run.device)
        else:
            images = Augmented(dataset.train, preprocessing, run.device, config.augment, config.workers)
    model = adapted(run, backbone, images)
    return TuneRun(
        **vars(run),
        model=model,
        samples=len(images),
        origin={**dataset.origin(), **weights_origin(weights), **initialisation(config)},
        weights_sha256=weights.sha256,
        images=images,
        validation=validation,
        dataset=dataset,
        preprocessing=preprocessing,
        weights=weights,
    )


def _load(config: TuneConfig) -> Dataset:
    (read,) = data_parts(config)
    return read()


def data_parts(config: TuneConfig) -> list[partial[Dataset]]:
    """What reads the data of a run of this configuration, every picture once."""
    return [partial(load, config.data, config.validation, config.seed, config.skip_broken)]


def origin_parts(config: TuneConfig) -> list[partial[Origin]]:
    """What gives the content that a run of this configuration would be made of now, part by part.

    No model is built, no network asked. Each raises an OSError if its part is not there, and a ValueError if it is
    damaged.
    """
    return [
        partial(_data_origin, config.data, config.validation, config.seed, config.skip_broken),
        partial(found_weights, config.model, config.weights),
        partial(initialisation, config),
    ]


def _data_origin(place: str, validation: float, seed: int, skip_broken: bool) -> Origin:
    return load(place, validation, seed, skip_broken).origin()


# ---------------------------------------------------------------------------------------------------- train and score


def train(run: TuneRun, notes: dict[str, Any], checkpoint: Checkpoint | None) -> Progress:
    """Train to the end, and leave the model as it was after its best epoch; every epoch leaves a checkpoint."""
    config, log = run.config, run.session.log
    steps = -(-len(run.images) // config.batch_size)
    optimiser = make_optimiser(run.model, config)
    progress = checkpoints.restore(run, optimiser, checkpoint)
    best: dict[str, Tensor] = checkpoint.state["best"] if checkpoint else {}

    def after_epoch(progress: Progress) -> None:
        nonlocal best
        found = _answer(run, "validation", _in_chunks(run.validation))
        progress.accuracies[progress.epoch] = top1 = found.correct / len(found)
        if best_epoch(progress) == progress.epoch:
            best = {name: tensor.clone() for name, tensor in checkpoints.trained(run.model).items()}
        if log:
            log("validation/top1", top1, len(progress.losses))
        checkpoints.save(run, optimiser, progress, notes, best)
        run.session.say(
            f"epoch {progress.epoch:3d} loss {sum(progress.losses[-steps:]) / steps:.3f}, validation top-1 "
            f"{100 * top1:.2f} %, {progress.seconds[-1]:.1f} s"
        )

    train_epochs(run.model, optimiser, run.images, config, run.precision, progress, after_epoch, run.session)
    with torch.no_grad():
        for name, tensor in checkpoints.trained(run.model).items():
            tensor.copy_(best[name])
    return progress


def best_epoch(progress: Progress) -> int:
    """The epoch with the highest top-1 on validation, of several the last."""
    return max(progress.accuracies, key=lambda epoch: (progress.accuracies[epoch], epoch))


def _in_chunks(images: Images, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(images.pixels.split(size), images.labels.cpu().split(size), strict=True)


def _answer(run: TuneRun, part: str, chunks: Iterable[tuple[Tensor, Tensor]], few: Tensor | None = None) -> Answers:
    return answer(run.model, chunks, run.preprocessing, run.device, run.precision, run.session.quiet, part, few)


def score(run: TuneRun, progress: Progress) -> dict[str, Any]:
    """Open the test part, if there is one, and say how many of its images are classified correctly."""
    config, dataset, best, test = run.config, run.dataset, best_epoch(progress), None
    validation = _score("validation", round(progress.accuracies[best] * len(run.validation)), len(run.validation))
    if dataset.test is not None and config.evaluate == "test":
        with run.stage("test"):
            chunks = Stream(dataset.test, run.preprocessing, config.workers)
            found = _answer(run, "test", chunks, sample(len(dataset.test)))
        test = _score("test", found.correct, len(found))
        if run.session.log:
            run.session.log("test/top1", test["top1"], len(progress.losses))
    else:
        few = sample(len(run.validation))
        chunk = run.validation.pixels[few.to(run.validation.pixels.device)], run.validation.labels.cpu()[few]
        found = _answer(run, "validation", [chunk], torch.arange(len(few), device="cpu"))
    part = "test" if test else "validation"
    write_answers(found, dataset.classes, f"{dataset.location}, {part} images", run.folder)
    parts = dict.fromkeys(("training", "validation", "test")) | dataset.splits
    data = {
        part: split and {"source": dataset.source, "location": dataset.location, "images": len(split)}
        for part, split in parts.items()
    }
    return {
        "validation": validation,
        "test": test,
        "best_epoch": best,
        "classes": list(dataset.classes),
        "num_classes": len(dataset.classes),
        "data": {
            "train": data.pop("training"),
            **data,
            "skipped": list(map(str, dataset.skipped)),
            "notes": list(dataset.notes),
        },
        "weights": asdict(run.weights),
        "preprocessing": asdict(run.preprocessing),
        "step": progress.step,
        "top1_per_epoch": {str(epoch): value for epoch, value in progress.accuracies.items()},
        "images_per_second": {"train": len(run.images) * config.epochs / run.seconds["train"]},
    }


def _score(split: str, correct: int, count: int) -> dict[str, Any]:
    return {"top1": correct / count, "correct": correct, "count": count, "split": split}


def adapter_settings(result: dict[str, Any]) -> dict[str, Any]:
    """What `predict` and `evaluate` need beside the adapter's own files."""
    about = of_run(result, Path(result["data"]["train"]["location"]).name)
    return {**about, "classes": result["classes"], "validation": result["validation"]}


HARNESS = Harness(
    kept=KEPT,
    prepare=prepare,
    origin=origin_parts,
    resume=checkpoints.load,
    train=train,
    score=score,
    summary=summary,
    next_steps=next_steps,
    card=model_card,
    settings=adapter_settings,
    data=data_parts,
    leaves=(ANSWERS,),
)
