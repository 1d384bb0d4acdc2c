"""A page in a browser that classifies the picture dropped on it, made with Gradio."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from abm_vision.images.classifier import Classifier

if TYPE_CHECKING:
    from gradio import Interface

SHOWN = 5  # most likely classes


def page(classifier: Classifier) -> Interface:
    """The page, to be launched or put into a larger one. A picture is read as `predict` reads it.

    Raises:
        ModuleNotFoundError: gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'the page needs {error.name}: pip install -e ".[demo]"') from None

    def classify(path: str | None) -> dict[str, float] | None:
        if path is None:
            return None
        try:
            (chances,) = next(classifier.probabilities([Path(path)]))
        except ValueError as error:
            raise gradio.Error(str(error)) from None
        return dict(zip(classifier.classes, chances.tolist(), strict=True))

    side = classifier.preprocessing.image_size
    return gradio.Interface(
        classify,
        # The file as it is: its EXIF, transparency and bits are read here.
        gradio.Image(type="filepath", image_mode=None, sources=["upload", "clipboard"], label="picture"),
        gradio.Label(num_top_classes=SHOWN, label="class"),
        title=classifier.task,
        description=f"{len(classifier.classes)} classes; training images: {classifier.trained_on}. Pictures are "
        f"resized to {side} x {side} pixels.",
        flagging_mode="never",
        analytics_enabled=False,  # else it would report to its makers
    )
