"""What `result.json` of a run on one's own images holds, and what is said of it."""

from __future__ import annotations

import shlex
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from abm_vision.abm.arguments import count
from abm_vision.images.records import Score, Shape, Weights
from abm_vision.initializers import BASELINE
from abm_vision.runs import records
from abm_vision.runs.folder import CHECKPOINT, Kept
from abm_vision.runs.markup import code, markdown
from abm_vision.runs.records import Positive, Record, Share, StepKind, settings_of
from abm_vision.tune.config import TuneConfig

SOURCES = ("folder", "csv", "datasets")


class Part(Record):
    """A part of the data."""

    source: Literal[SOURCES]
    location: str
    images: Positive


class Data(Record):
    """The parts, what was left out, and what else was found."""

    train: Part
    validation: Part
    test: Part | None
    skipped: list[str]
    notes: list[str]


class Speed(Record):
    """Images per second."""

    train: Annotated[float, Field(gt=0)]


class Result(records.Result):
    """`result.json` of a run on one's own images."""

    config: settings_of(TuneConfig)
    validation: Score
    test: Score | None
    best_epoch: Positive
    classes: Annotated[list[str], Field(min_length=2)]
    num_classes: Positive
    data: Data
    weights: Weights
    preprocessing: Shape
    step: StepKind = "eager"  # results of before have none, and were eager
    top1_per_epoch: Annotated[dict[str, Share], Field(min_length=1)]
    images_per_second: Speed

    @model_validator(mode="after")
    def _fits(self) -> Result:
        if len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} names are not those of {self.num_classes} classes")
        parts = {"training", "validation"} | ({"test"} if self.test else set())
        wanted = {f"{part} {what}" for part in parts for what in ("images", "labels")} | {"weights", "initialisation"}
        if absent := sorted(wanted - set(self.origin)):
            raise ValueError(f"its origin lacks {', '.join(absent)}")
        steps = -(-self.data.train.images // self.config["batch_size"])
        if len(self.loss_per_step) != steps * self.config["epochs"]:
            raise ValueError(f"{len(self.loss_per_step)} losses are not {steps} in every epoch")
        return self


KEPT = Kept(TuneConfig, Result, unfinished=(CHECKPOINT,))


def scored(result: dict[str, Any]) -> dict[str, Any]:
    """The score that counts: of the test part, of the validation part where there is none."""
    return result["test"] or result["validation"]


def summary(result: dict[str, Any]) -> str:
    """Data and score."""
    data, held_out = result["data"]["train"], scored(result)
    top1 = f"top-1 {100 * held_out['top1']:.2f} % of {held_out['count']} {held_out['split']} images"
    best = f"epoch {result['best_epoch']} of {result['config']['epochs']}"
    return f"{data['location']} [{result['num_classes']} classes]  {top1}, {best}"


def next_steps(result: dict[str, Any]) -> str:
    """What can be done with the adapter now."""
    config, folder = result["config"], shlex.quote(result["folder"])
    data, skip = shlex.quote(config["data"]), " --skip-broken" * config["skip_broken"]
    other = "abm" if config["init"] == BASELINE else config["init"]
    return "\n".join(
        (
            "next:",
            f"  abm-tune predict {folder} IMAGE|FOLDER...{skip}      classes of other images",
            f"  abm-tune evaluate {folder} FOLDER{skip}      accuracy by class, confusions, mistakes: labelled images",
            f"  abm-tune export {folder} --to onnx --normalise --out model.onnx      one file; merge: one for timm",
            f"  abm-tune demo {folder}      a page in the browser",
            f"  abm-tune compare {data} --init {BASELINE},{other} --lr {config['lr']:g} --seeds 3{_changed(config)}",
            f"  {folder}/adapter is in peft's format: load_adapter of abm_vision, or PeftModel.from_pretrained;",
            "  push_to_hub of abm_vision shares it",
        )
    )


def _changed(config: dict[str, Any]) -> str:
    """The flags of a run that are not the defaults, but for those that a comparison has of its own."""
    defaults, flags = TuneConfig().to_dict(), ""
    for name in sorted(TuneConfig.shared() - {"data", "init", "lr", "seed", "preset"}):
        if config[name] != defaults[name]:
            flags += f" --{name.replace('_', '-')}"
            flags += "" if config[name] is True else f" {shlex.quote(str(config[name]))}"
    return flags


def model_card(result: dict[str, Any]) -> str:
    """What the adapter's model card says of its training: what it does and how well."""
    config, held_out = result["config"], scored(result)
    images = f"{result['data']['train']['images']} images of {result['num_classes']} classes"
    return f"""# {markdown(config["model"])}, adapted to one's own images

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}, qkv: {config["qkv"]}), initialised by
{code(config["init"])}. Trained for {count(config["epochs"], "epoch")} on {images}, seed {config["seed"]}; the weights
are those of epoch {result["best_epoch"]}, the best on the validation images.

Top-1: {100 * held_out["top1"]:.2f} % of {held_out["count"]} {held_out["split"]} images.
"""
