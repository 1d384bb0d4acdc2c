"""A run's adapter on its model, as a classifier of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from pydantic import ConfigDict
from torch import Tensor

from abm_vision.abm.loading import load_adapter, read_settings
from abm_vision.abm.saving import ABM_FILE
from abm_vision.images.data import Preprocessing, stream
from abm_vision.images.photos import Photos, PhotoSplit
from abm_vision.images.records import Shape, Weights
from abm_vision.images.train import classify
from abm_vision.runs.folder import ADAPTER
from abm_vision.runs.records import Count, Positive, Record, checked
from abm_vision.weights import create_backbone


class Run(Record):
    """Settings of the run that the adapter is from."""

    model: str
    weights: str
    seed: Count
    task: str
    init: str


class Trained(Record):
    """What `abm.json` says of a run; other entries are of the adapter itself."""

    model_config = ConfigDict(extra="ignore")
    run: Run
    num_classes: Positive
    classes: list[str] | None = None
    weights: Weights
    preprocessing: Shape
    data_source: str


@dataclass(frozen=True)
class Classifier:
    """A model with a run's adapter.

    Args:
        model: in evaluation mode, on the device.
        preprocessing: what it expects.
        classes: names in the order of the outputs; numbers where the run knew none.
        task: of the run.
        trained_on: the source of its training images.
        device: where it computes, in float32.
    """

    model: PeftModel
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    task: str
    trained_on: str
    device: torch.device

    def probabilities(self, paths: Sequence[Path], workers: int = 0) -> Iterator[Tensor]:
        """(n, classes) of one image file after another, in chunks.

        Raises:
            FileNotFoundError, ValueError: a file is missing or no picture.
        """
        photos = PhotoSplit(Photos(tuple(paths), np.zeros(len(paths), dtype=np.int64)), np.arange(len(paths)))
        chunks = stream(photos, self.preprocessing, workers)
        for logits, _ in classify(self.model, chunks, self.preprocessing, self.device, "fp32"):
            yield logits.softmax(-1)


def load_classifier(adapter: str | Path, weights: str | None = None, device: str | torch.device = "cpu") -> Classifier:
    """The classifier that a run has trained.

    Args:
        adapter: a run's folder, or the adapter's own.
        weights: of the backbone, as in `create_backbone`; None means those that the run was given.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError: the adapter is missing or broken, was not saved by a run on images, or other
            weights are found.
    """
    folder = Path(adapter)
    folder = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    settings = read_settings(folder)
    if "run" not in settings:
        raise ValueError(f"{folder} was not written by a run, so model and image size are not known: use load_adapter")
    checked(settings, Trained, str(folder / ABM_FILE), "it is damaged, or was not written by a run on images")
    run, shape = settings["run"], Preprocessing(**settings["preprocessing"])
    sha256, location = settings["weights"]["sha256"], settings["weights"]["location"]
    torch.manual_seed(run["seed"])  # a run on random weights drew them from its seed
    backbone, source = create_backbone(
        run["model"], settings["num_classes"], shape.image_size, run["weights"] if weights is None else weights
    )
    if source.sha256 != sha256:
        raise ValueError(
            f"{folder} was trained on {location} (sha256 {sha256}), found was {source}: pass the same weights"
        )
    return Classifier(
        model=load_adapter(backbone, folder).eval().to(device),
        preprocessing=shape,
        classes=tuple(settings.get("classes") or map(str, range(settings["num_classes"]))),
        task=run["task"],
        trained_on=settings["data_source"],
        device=torch.device(device),
    )
