"""What `result.json` of a run of VTAB-1K holds, and what is said of it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from abm_vision.abm.arguments import count
from abm_vision.images.records import Score, Shape, Weights
from abm_vision.runs import records
from abm_vision.runs.folder import CHECKPOINT, Kept
from abm_vision.runs.markup import code, markdown
from abm_vision.runs.records import Positive, Record, Share, StepKind, settings_of
from abm_vision.vtab.config import RunConfig

ORIGIN = {"training images", "training labels", "test images", "test labels", "weights", "initialisation"}


class Test(Score):
    """The score, and how many images the split has."""

    split_size: Positive

    @model_validator(mode="after")
    def _a_part(self) -> Test:
        if self.count > self.split_size:
            raise ValueError(f"{self.count} counted of {self.split_size} that there are")
        return self


class Data(Record):
    """Where images are from."""

    task: str
    split: str
    source: Literal["tfds", "folder", "rendered"]
    description: str
    images: Positive


class Splits(Record):
    """What was trained on, and what was scored."""

    train: Data
    test: Data


class Speed(Record):
    """Images per second."""

    train: Annotated[float, Field(gt=0)]
    test: Annotated[float, Field(gt=0)]


class Result(records.Result):
    """`result.json` of a run of VTAB-1K."""

    config: settings_of(RunConfig)
    test: Test
    data: Splits
    num_classes: Positive
    weights: Weights
    preprocessing: Shape
    step: StepKind = "eager"  # results of before have none, and were eager
    top1_per_epoch: dict[str, Share]
    images_per_second: Speed
    reference_only: bool

    @model_validator(mode="after")
    def _every_step(self) -> Result:
        for part, data in (("training", self.data.train), ("test", self.data.test)):
            if data.task != self.config["task"]:
                raise ValueError(f"the {part} data are of {data.task}, the run is of {self.config['task']}")
        if self.test.count != self.data.test.images or self.test.split != self.data.test.split:
            raise ValueError(f"{self.test.count} images of {self.test.split} are not the test data")
        if absent := sorted(ORIGIN - set(self.origin)):
            raise ValueError(f"its origin lacks {', '.join(absent)}")
        steps = -(-self.data.train.images // self.config["batch_size"])
        if len(self.loss_per_step) != steps * self.config["epochs"]:
            raise ValueError(f"{len(self.loss_per_step)} losses are not {steps} in every epoch")
        absent = sorted({"data", "weights", "lora", "test"} - set(self.seconds))
        if absent:
            raise ValueError(f"it lacks seconds.{', seconds.'.join(absent)}")
        return self


KEPT = Kept(RunConfig, Result, unfinished=(CHECKPOINT,))


def summary(result: dict[str, Any]) -> str:
    """Task, kind of the test images, and score."""
    test, source = result["test"], result["data"]["test"]["source"]
    top1 = f"top-1 {100 * test['top1']:.2f} % of {test['count']} {test['split']} images"
    return f"{result['config']['task']} [{source}]  {top1}"


def model_card(result: dict[str, Any]) -> str:
    """What the adapter's model card says of its training: what it does and how well."""
    config, test = result["config"], result["test"]
    train_data, test_data = (
        f"{result['data'][k]['images']} images ({markdown(result['data'][k]['description'])})"
        for k in ("train", "test")
    )
    return f"""# {markdown(config["model"])}, adapted to {config["task"]}

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}, qkv: {config["qkv"]}), initialised by
{code(config["init"])}.
Trained for {count(config["epochs"], "epoch")} on {train_data}, seed {config["seed"]}.

Top-1 on {test["split"]}: {100 * test["top1"]:.2f} % of {test_data}.
"""
