"""The most likely classes of image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from abm_vision.images.classifier import load_classifier


def predict(
    adapter: str | Path,
    images: Sequence[str | Path],
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    top: int = 1,
) -> list[dict[str, Any]]:
    """Classify image files, whatever their size; they are squashed to the model's square, as in training.

    Args:
        adapter: a run's folder, or the adapter's own.
        images: image files of any format that Pillow reads.
        weights: of the backbone, as in `create_backbone`; None means those that the run was given.
        device: where to compute.
        top: how many of the most likely classes to give.

    Returns:
        One dictionary an image: image (as given); the run's task; trained_on, the source of its training images; top,
        the most likely classes, each with label (its position), class (its name) and probability; and the same three of
        the first.

    Raises:
        FileNotFoundError, ValueError: an image or the adapter is missing or broken, or was not saved by a run on
            images; or `top` is not positive.
    """
    if top < 1:
        raise ValueError(f"top is {top}; it must be 1 or more")
    classifier = load_classifier(adapter, weights, device)
    names, rows = classifier.classes, []
    remaining = iter(images)
    for chunk in classifier.probabilities([Path(image) for image in images]):
        for image, probabilities in zip([next(remaining) for _ in chunk], chunk, strict=True):
            best = zip(*(found.tolist() for found in probabilities.topk(min(top, len(names)))), strict=True)
            likely = [{"label": label, "class": names[label], "probability": value} for value, label in best]
            about = {"image": str(image), "task": classifier.task, "trained_on": classifier.trained_on}
            rows.append({**about, **likely[0], "top": likely})
    return rows
