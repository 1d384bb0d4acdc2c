"""VTAB-1K for the spine (`runs.run`): its data and models, its training and its score."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

import vtab_tasks
from abm_vision.images.answers import ANSWERS, Answers, answer, sample, write_answers
from abm_vision.images.data import Images, Preprocessing, Stream, load_all
from abm_vision.images.description import of_run
from abm_vision.images.model import adapted, found_weights, pretrained, weights_origin
from abm_vision.images.train import make_optimiser
from abm_vision.images.train import train as train_epochs
from abm_vision.runs import checkpoint as checkpoints
from abm_vision.runs.checkpoint import Progress
from abm_vision.runs.content import Origin, initialisation, remembered
from abm_vision.runs.harness import Checkpoint, Harness, Prepared, Run, Session, SessionOptions
from abm_vision.runs.run import run as run_spine
from abm_vision.vtab.config import EVALUATIONS, HANDFUL, RunConfig
from abm_vision.vtab.results import KEPT, model_card, summary
from abm_vision.weights import WeightSource
from vtab_tasks.content import content

if TYPE_CHECKING:
    from typing_extensions import Unpack

SUBSET_SEED = 0  # a subset of a split is the same for every run


def run(config: RunConfig, out: str | Path = "results", **session: Unpack[SessionOptions]) -> dict[str, Any]:
    """Adapt a pretrained ViT to one task, test it once, and write everything under `out`.

    An interrupted run is resumed with the same result, bit for bit on CPU. The test split is opened after the last
    epoch (earlier only with `eval_epochs`, which decides nothing).

    `out` is the parent of the run's folder; `session` are the other fields of `abm_vision.runs.harness.Session`, such
    as rerun, diagnose, say and log. What is returned and raised is that of `abm_vision.runs.run.run`.
    """
    return run_spine(HARNESS, config, Session(out, **session))


# ------------------------------------------------------------------------------------------ data, weights and adapter


@dataclass(kw_only=True)
class VtabRun(Prepared):
    """A run of VTAB-1K with its data, and what is recorded of them.

    Args:
        images: the training images, on the device.
        train_data, test_data: where they are from.
        split_size: images in the split that test_data is from.
        preprocessing: what the model expects.
        weights: where they are from.
    """

    config: RunConfig
    images: Images
    train_data: vtab_tasks.TaskData
    test_data: vtab_tasks.TaskData
    split_size: int
    preprocessing: Preprocessing
    weights: WeightSource

    def select(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """(float images (n, 3, size, size), labels (n,)) at these positions."""
        return self.images.select(indices)


def prepare(run: Run) -> VtabRun:
    """Data, pretrained weights and the adapted model.

    Raises:
        ValueError, OSError, WeightsNotFound: of the data, the weights, or the adapter, each with one message.
    """
    config, say = run.config, run.session.say
    with run.stage("data"):
        (train_data, _), (test_data, split_size) = _load(config, "training"), _load(config, "test")
        test_split = test_data.split
        say(f"data      {train_data.description}; {len(train_data)} training and {len(test_data)} {test_split} images")
    backbone, weights, preprocessing = pretrained(run, train_data.task.num_classes)
    with run.stage("data"):
        images = Images(*load_all(train_data, preprocessing), preprocessing, run.device)
    model = adapted(run, backbone, images)
    data = {**_data_origin("training", train_data), **_data_origin("test", test_data)}
    return VtabRun(
        **vars(run),
        model=model,
        samples=len(images),
        origin={**data, **weights_origin(weights), **initialisation(config)},
        weights_sha256=weights.sha256,
        images=images,
        train_data=train_data,
        test_data=test_data,
        split_size=split_size,
        preprocessing=preprocessing,
        weights=weights,
    )


def prepare_handful(run: Run) -> VtabRun:
    """The same with a handful of the training images alone."""
    whole = prepare(run)
    few = whole.train_data.subset(HANDFUL, SUBSET_SEED)
    images = Images(*load_all(few, whole.preprocessing), whole.preprocessing, run.device)
    return replace(whole, images=images, train_data=few, samples=len(images))


def origin_parts(config: RunConfig) -> list[partial[Origin]]:
    """What gives the content that a run of this configuration would be made of now, part by part.

    No model is built, no network asked. Each raises an OSError if its part is not there, and a ValueError if it is
    damaged.
    """
    data = _data_alone(config)
    return [
        partial(_found_data, "training", data),
        partial(_found_data, "test", data),
        partial(found_weights, config.model, config.weights),
        partial(initialisation, config),
    ]


def data_parts(config: RunConfig) -> list[partial[Any]]:
    """What reads the data of a run of this configuration: lists and records are checked, images are not decoded."""
    return [partial(_load, _data_alone(config), part) for part in ("training", "test")]


def _data_alone(config: RunConfig) -> RunConfig:
    """Equal for all runs on the same data."""
    fields = ("task", "evaluate", "source", "data_dir", "test_images")
    return RunConfig.make(**{name: getattr(config, name) for name in fields})


def _found_data(part: str, config: RunConfig) -> Origin:
    return _data_origin(part, _load(config, part)[0])


def _data_origin(part: str, data: vtab_tasks.TaskData) -> Origin:
    return {f"{part} {name}": found for name, found in content(data, remembered).items()}


def _load(config: RunConfig, part: str) -> tuple[vtab_tasks.TaskData, int]:
    """Training or test data, and how many images their split has."""
    split = dict(zip(("training", "test"), EVALUATIONS[config.evaluate], strict=True))[part]
    data = vtab_tasks.load(config.task, split, source=config.source, data_dir=config.data_dir)
    if part == "test" and 0 < config.test_images < len(data):
        return data.subset(config.test_images, SUBSET_SEED), len(data)
    return data, len(data)


# ---------------------------------------------------------------------------------------------------- train and score


def train(run: VtabRun, notes: dict[str, Any], checkpoint: Checkpoint | None) -> Progress:
    """Train to the end; every epoch leaves a checkpoint, and top-1 where it is followed."""
    config, log = run.config, run.session.log
    steps = -(-len(run.images) // config.batch_size)
    optimiser = make_optimiser(run.model, config)
    progress = checkpoints.restore(run, optimiser, checkpoint)

    def after_epoch(progress: Progress) -> None:
        if config.eval_epochs and progress.epoch % config.eval_epochs == 0 and progress.epoch < config.epochs:
            found = _test(run)
            progress.accuracies[progress.epoch] = found.correct / len(found)
            if log:
                log("test/top1", found.correct / len(found), len(progress.losses))
        checkpoints.save(run, optimiser, progress, notes)
        run.session.say(
            f"epoch {progress.epoch:3d} loss {sum(progress.losses[-steps:]) / steps:.3f}, {progress.seconds[-1]:.1f} s"
        )

    train_epochs(run.model, optimiser, run.images, config, run.precision, progress, after_epoch, run.session)
    return progress


def score(run: VtabRun, progress: Progress) -> dict[str, Any]:
    """Open the test split, and say how many of its images are classified correctly."""
    config, seconds, test_data = run.config, run.seconds, run.test_data
    with run.stage("test"):
        found = _test(run)
    correct, count = found.correct, len(found)
    task, names = test_data.task, [*map(str, range(test_data.task.num_classes))]
    of = f"{task.name} [{test_data.source}], {test_data.split} images; classes: {task.classes}"
    write_answers(found, names, of, run.folder)
    if run.session.log:
        run.session.log("test/top1", correct / count, len(progress.losses))
    if config.eval_epochs:
        progress.accuracies[config.epochs] = correct / count
    test = {"top1": correct / count, "correct": correct, "count": count}
    return {
        "test": {**test, "split": test_data.split, "split_size": run.split_size},
        "data": {"train": _data_record(run.train_data), "test": _data_record(test_data)},
        "num_classes": run.train_data.task.num_classes,
        "weights": asdict(run.weights),
        "preprocessing": asdict(run.preprocessing),
        "step": progress.step,
        "top1_per_epoch": {str(epoch): value for epoch, value in progress.accuracies.items()},
        "images_per_second": {
            "train": len(run.images) * config.epochs / seconds["train"],
            "test": count / seconds["test"],
        },
    }


def _data_record(data: vtab_tasks.TaskData) -> dict[str, Any]:
    """What a result says of its data."""
    return {
        "task": data.task.name,
        "split": data.split,
        "source": data.source,
        "description": data.description,
        "images": len(data),
    }


def _test(run: VtabRun) -> Answers:
    chunks = Stream(run.test_data, run.preprocessing, run.config.workers)
    few = sample(len(run.test_data))
    return answer(run.model, chunks, run.preprocessing, run.device, run.precision, run.session.quiet, sampled=few)


def adapter_settings(result: dict[str, Any]) -> dict[str, Any]:
    """What `predict` needs beside the adapter's own files."""
    return of_run(result, result["config"]["task"])


HARNESS = Harness(
    kept=KEPT,
    prepare=prepare,
    origin=origin_parts,
    resume=checkpoints.load,
    train=train,
    score=score,
    summary=summary,
    card=model_card,
    settings=adapter_settings,
    data=data_parts,
    leaves=(ANSWERS,),
)
SMOKE = replace(HARNESS, prepare=prepare_handful)
