"""A run's adapter on its model, as a classifier of image files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from abm_vision.abm.loading import load_adapter
from abm_vision.images.data import Preprocessing, Stream
from abm_vision.images.description import build, read_description
from abm_vision.images.photos import Photos, PhotoSplit
from abm_vision.images.train import classify
from abm_vision.runs.folder import adapter_folder


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
        chunks = Stream(photos, self.preprocessing, workers)
        for logits, _ in classify(self.model, chunks, self.preprocessing, self.device, "fp32"):
            yield logits.softmax(-1)


def load_classifier(adapter: str | Path, weights: str | None = None, device: str | torch.device = "cpu") -> Classifier:
    """The classifier that a run or `save_adapter` has left.

    Args:
        adapter: a run's folder, or the adapter's own.
        weights: of the backbone, as in `create_backbone`; None means those that the run was given.
        device: where to compute.

    Raises:
        FileNotFoundError, ValueError: the adapter is missing or broken, was not saved by a run on images, or other
            weights are found.
    """
    folder = adapter_folder(adapter)
    settings = read_description(folder)
    shape, run = settings["preprocessing"], settings.get("run") or {"task": folder.name}
    return Classifier(
        model=load_adapter(build(folder, weights), folder).eval().to(device),
        preprocessing=Preprocessing(**shape),
        classes=tuple(settings.get("classes") or map(str, range(settings["num_classes"]))),
        task=run["task"],
        trained_on=settings.get("data_source", "images that were not recorded"),
        device=torch.device(device),
    )
