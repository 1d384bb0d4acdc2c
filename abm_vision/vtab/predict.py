"""Classify image files with a saved adapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from abm_vision.abm.saving import ABM_FILE, load_adapter, read_settings
from abm_vision.runs.folder import ADAPTER
from abm_vision.vtab.data import Preprocessing
from abm_vision.weights import create_backbone
from vtab_tasks.sources.folder import eight_bits

RUN = ("model", "weights", "seed", "task")  # what is to be known of the run


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
    try:
        run, shape = {name: settings["run"][name] for name in RUN}, Preprocessing(**settings["preprocessing"])
        classes, sha256, location = settings["num_classes"], *(settings["weights"][k] for k in ("sha256", "location"))
        trained_on = settings["data_source"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / ABM_FILE} lacks {error}: it is damaged, or was not written by a run") from error
    pixels = torch.cat([shape.resize(_read_image(path)[None]) for path in images])
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


def _read_image(path: str | Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(eight_bits(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except (OSError, SyntaxError, ValueError, TypeError, RuntimeError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None
