"""Classify image files with a saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from abm_vision.abm.loading import load_adapter, read_settings
from abm_vision.abm.saving import ABM_FILE
from abm_vision.images.data import Preprocessing
from abm_vision.images.records import Shape, Weights
from abm_vision.runs.folder import ADAPTER
from abm_vision.runs.records import Count, Positive, Record, checked
from abm_vision.weights import create_backbone
from vtab_tasks.sources.folder import read_image


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
    weights: Weights
    preprocessing: Shape
    data_source: str


def predict(
    adapter: str | Path, images: Sequence[str | Path], *, weights: str | None = None, device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """The class of every image.

    Args:
        adapter: a run's folder, or the adapter's own.
        images: image files of any format that Pillow reads; they are squashed to the model's square, as in training.
        weights: of the backbone, as in `create_backbone`; None means those that the run was given.
        device: where to compute.

    Returns:
        One dictionary an image: image (as given), label, probability, the run's task, and the source of its training
        images.

    Raises:
        FileNotFoundError, ValueError: an image or the adapter is missing or broken, or was not saved by a run.
    """
    folder = Path(adapter)
    folder = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    settings = read_settings(folder)
    if "run" not in settings:
        raise ValueError(f"{folder} was not written by a run, so model and image size are not known: use load_adapter")
    checked(settings, Trained, str(folder / ABM_FILE), "it is damaged, or was not written by a run of VTAB-1K")
    run, shape = settings["run"], Preprocessing(**settings["preprocessing"])
    classes, trained_on = settings["num_classes"], settings["data_source"]
    sha256, location = settings["weights"]["sha256"], settings["weights"]["location"]
    pixels = torch.cat([shape.resize(read_image(path)[None]) for path in images])
    torch.manual_seed(run["seed"])  # a run on random weights drew them from its seed
    backbone, source = create_backbone(
        run["model"], classes, shape.image_size, run["weights"] if weights is None else weights
    )
    if source.sha256 != sha256:
        raise ValueError(
            f"{folder} was trained on {location} (sha256 {sha256}), found was {source}: pass the same weights"
        )
    model = load_adapter(backbone, folder).eval().to(device)
    with torch.no_grad():
        probabilities = model(shape.normalise(pixels.to(device))).softmax(-1).cpu()
    return [
        {
            "image": str(path),
            "task": run["task"],
            "trained_on": trained_on,
            "label": int(p.argmax()),
            "probability": float(p.max()),
        }
        for path, p in zip(images, probabilities, strict=True)
    ]
