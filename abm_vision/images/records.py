"""Records that results of image classification have in common (`runs.records`)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from abm_vision.runs.records import Count, Positive, Record, Share


class Score(Record):
    """How many images of a split are classified correctly."""

    top1: Share
    correct: Count
    count: Positive
    split: str

    @model_validator(mode="after")
    def _parts(self) -> Score:
        if self.correct > self.count:
            raise ValueError(f"{self.correct} correct of {self.count} counted")
        if abs(self.top1 * self.count - self.correct) > 0.5:
            raise ValueError(f"top1 is {self.top1}, and {self.correct} of {self.count} are correct")
        return self


class Weights(Record):
    """A `WeightSource`."""

    name: str
    origin: str
    location: str
    sha256: str | None


class Shape(Record):
    """A `Preprocessing`."""

    image_size: Annotated[int, Field(ge=1, le=2**14)]
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic"]  # what torchvision knows of tensors
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    crop_mode: Literal["squash", "center"] = "squash"
