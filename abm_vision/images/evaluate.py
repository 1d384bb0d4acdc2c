"""How well a run's adapter does on labelled image files: by class, by confusion, and where it is wrong and sure."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from abm_vision.abm.files import write_atomically, write_json, writing
from abm_vision.drawing import save_figure
from abm_vision.images.classifier import load_classifier
from abm_vision.images.figures import draw_confusion, draw_sheet
from abm_vision.images.listing import Photo, find
from abm_vision.images.photos import check_readable, read_photo

MISTAKES = 24  # shown on the contact sheet


@dataclass(frozen=True)
class Evaluation:
    """What came of it.

    Attributes:
        classes: names, in the order of the model's outputs.
        paths: the images.
        labels, predicted: positions in `classes`, int64 (n,).
        probability: of what was predicted, float (n,).
        part: of the folder that was evaluated: test, validation or train; None where it has no parts.
        skipped: broken files that were left out, with the reason.
    """

    classes: tuple[str, ...]
    paths: Sequence[Path]
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    part: str | None
    skipped: dict[Path, str] = field(default_factory=dict)

    @property
    def confusion(self) -> NDArray[np.int64]:
        """Images of class i that were taken for class j."""
        matrix = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        np.add.at(matrix, (self.labels, self.predicted), 1)
        return matrix

    @property
    def top1(self) -> float:
        """Share of the images whose most likely class is theirs."""
        return float((self.labels == self.predicted).mean())

    @property
    def mistakes(self) -> list[int]:
        """Positions of the images that were taken for another class, the surest first."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.probability[wrong], kind="stable")].tolist()

    def numbers(self) -> dict[str, Any]:
        """The scores, as JSON values."""
        found = {"top1": self.top1, "images": len(self.labels), "part": self.part, "classes": self.rows()}
        return {**found, "skipped": list(map(str, self.skipped))}

    def rows(self) -> list[dict[str, Any]]:
        """By class: images, how many are correct, recall, precision (None of nothing), most often mistaken for what."""
        matrix, found = self.confusion, []
        for k, name in enumerate(self.classes):
            images, taken, correct = int(matrix[k].sum()), int(matrix[:, k].sum()), int(matrix[k, k])
            others = np.where(np.arange(len(self.classes)) == k, 0, matrix[k])
            found.append(
                {
                    "class": name,
                    "images": images,
                    "correct": correct,
                    "recall": correct / images if images else None,
                    "precision": correct / taken if taken else None,
                    "taken_for": self.classes[int(others.argmax())] if others.any() else None,
                }
            )
        return found


def evaluate(
    adapter: str | Path,
    place: str | Path,
    *,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    skip_broken: bool = False,
) -> Evaluation:
    """Classify labelled images, and compare.

    Args:
        adapter: a run's folder, or the adapter's own.
        place: images by class (see `images.listing`); of one with parts the test part, else the validation part.
        weights: of the backbone, as in `create_backbone`; None means those that the run was given.
        device: where to compute.
        skip_broken: leave out files that cannot be read.

    Raises:
        FileNotFoundError, ValueError: images or adapter are missing or broken, or the folder has classes that the
            adapter does not know.
    """
    photos, part = _held_out(find(place).photos)
    bad = check_readable([photo.path for photo in photos], skip_broken)
    photos = [photo for photo in photos if photo.path not in bad]
    if not photos:
        raise ValueError(f"{place} has no picture that can be read")
    classifier = load_classifier(adapter, weights, device)
    position = {name: k for k, name in enumerate(classifier.classes)}
    if unknown := sorted({photo.label for photo in photos} - set(position)):
        raise ValueError(
            f"{place} has pictures of {', '.join(unknown)}, which {adapter} was not trained on; it has "
            f"{', '.join(classifier.classes)}"
        )
    paths = [photo.path for photo in photos]
    probability, predicted = torch.cat(list(classifier.probabilities(paths))).max(-1)
    return Evaluation(
        classes=classifier.classes,
        paths=paths,
        labels=np.array([position[photo.label] for photo in photos]),
        predicted=predicted.numpy(),
        probability=probability.double().numpy(),
        part=part,
        skipped=bad,
    )


def _held_out(photos: Sequence[Photo]) -> tuple[list[Photo], str | None]:
    """The photos of the part that was not trained on, and its name."""
    part = next((p for p in ("test", "validation", "train") if any(photo.part == p for photo in photos)), None)
    return [photo for photo in photos if photo.part == part], part


def write_files(found: Evaluation, folder: Path) -> list[Path]:
    """Write figures, a line an image, and the numbers.

    Returns:
        confusion.png, mistakes.png (where there are any), predictions.csv, evaluation.json.

    Raises:
        CannotWrite: they cannot be written.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    written = [folder / name for name in ("confusion.png", "predictions.csv", "evaluation.json")]
    save_figure(draw_confusion(found.confusion, found.classes), written[0])
    write_atomically(written[1], lambda beside: _write_csv(found, beside))
    write_json(written[2], {**found.numbers(), "confusion": found.confusion.tolist()})
    shown = found.mistakes[:MISTAKES]
    (folder / "mistakes.png").unlink(missing_ok=True)
    if shown:
        names = [(found.classes[found.labels[k]], found.classes[found.predicted[k]]) for k in shown]
        captions = [f"{found.probability[k]:.2f} {b}\nis {a}" for k, (a, b) in zip(shown, names, strict=True)]
        title = "the surest of the mistakes: probability and name of what is said, and what it is"
        sheet = draw_sheet((read_photo(found.paths[k]) for k in shown), captions, title)
        save_figure(sheet, folder / "mistakes.png")
        written.insert(1, folder / "mistakes.png")
    return written


def _write_csv(found: Evaluation, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["image", "class", "predicted", "probability"])
        for image, label, predicted, probability in zip(
            found.paths, found.labels, found.predicted, found.probability, strict=True
        ):
            table.writerow([image, found.classes[label], found.classes[predicted], f"{probability:.6f}"])
