"""Classify image files with a saved adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import InterpolationMode

from abm_vision.abm.saving import ABM_FILE, REMEDY, load_adapter, read_settings
from abm_vision.runs.folder import ADAPTER
from abm_vision.vtab.data import Preprocessing
from abm_vision.weights import create_backbone
from vtab_tasks.sources.folder import read_image

SHAPE = tuple(field.name for field in fields(Preprocessing))


def _three(value: Any, above: float = -math.inf) -> bool:
    kinds = (int, float)
    return isinstance(value, list) and len(value) == 3 and all(type(v) in kinds and above < v < math.inf for v in value)


def _count(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**32


# Of `abm.json`: what is to be known of the run, in words, and whether a value is that.
FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("run.model", "run.weights", "run.task", "weights.location", "data_source"),
        ("a text", lambda value: isinstance(value, str)),
    ),
    "run.seed": ("a whole number from 0 on", lambda value: _count(value, 0)),
    "num_classes": ("a whole number from 1 on", lambda value: _count(value, 1)),
    "weights.sha256": ("a text, or null", lambda value: value is None or isinstance(value, str)),
    "preprocessing.image_size": ("a whole number from 1 on", lambda value: _count(value, 1)),
    "preprocessing.interpolation": (
        f"one of {', '.join(mode.value for mode in InterpolationMode)}",
        lambda value: isinstance(value, str) and value in {mode.value for mode in InterpolationMode},
    ),
    "preprocessing.mean": ("three numbers", _three),
    "preprocessing.std": ("three positive numbers", lambda value: _three(value, 0)),
}


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
    run = _read_run(folder)
    shape = Preprocessing(**{name: run[f"preprocessing.{name}"] for name in SHAPE})
    pixels = torch.cat([shape.resize(read_image(path)[None]) for path in images])
    torch.manual_seed(run["run.seed"])  # a run on random weights drew them from its seed
    backbone, source = create_backbone(
        run["run.model"], run["num_classes"], shape.image_size, run["run.weights"] if weights is None else weights
    )
    if source.sha256 != run["weights.sha256"]:
        raise ValueError(
            f"{folder} was trained on {run['weights.location']} (sha256 {run['weights.sha256']}), found was {source}: "
            "pass the same weights"
        )
    model = load_adapter(backbone, folder).eval().to(device)
    with torch.no_grad():
        probabilities = model(shape.normalise(pixels.to(device))).softmax(-1).cpu()
    return [
        {
            "image": str(path),
            "task": run["run.task"],
            "trained_on": run["data_source"],
            "label": int(p.argmax()),
            "probability": float(p.max()),
        }
        for path, p in zip(images, probabilities, strict=True)
    ]


def _read_run(folder: Path) -> dict[str, Any]:
    """The `FIELDS` of the run that wrote an adapter.

    Raises:
        FileNotFoundError, ValueError: there is no `abm.json`, it is damaged, or another program wrote it.
    """
    settings = read_settings(folder)
    if "run" not in settings:
        raise ValueError(f"{folder} was not written by a run, so model and image size are not known: use load_adapter")
    found: dict[str, Any] = {}
    for name, (needed, fits) in FIELDS.items():
        value: Any = settings
        for word in name.split("."):
            if not isinstance(value, dict) or word not in value:
                raise ValueError(
                    f"{folder / ABM_FILE} lacks {name}: it is damaged, or no run of abm-vtab wrote it; {REMEDY}"
                )
            value = value[word]
        if not fits(value):
            raise ValueError(f"{folder / ABM_FILE} has {name} {value!r}; needed is {needed}: {REMEDY}")
        found[name] = value
    return found
