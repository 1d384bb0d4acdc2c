"""What a model answers to a split: every prediction, and a few of the images for a picture (`answers.png`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from abm_vision.abm import bars
from abm_vision.drawing import save_figure
from abm_vision.images.data import Preprocessing
from abm_vision.images.figures import draw_sheet
from abm_vision.images.train import classify

ANSWERS = "answers.png"
SHOWN = 12  # images in the picture
SAMPLE_SEED = 0  # the same images for every run on the same split


@dataclass(frozen=True)
class Answers:
    """The answers to a split, in its order.

    Attributes:
        predicted, labels: int64 (n,).
        sampled: positions of a few of the images, int64 (k,), ascending.
        pixels: these images as the model gets them, before they are normalised: uint8 (k, 3, size, size).
    """

    predicted: Tensor
    labels: Tensor
    sampled: Tensor
    pixels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> int:
        """How many are."""
        return int((self.predicted == self.labels).sum())


def sample(total: int) -> Tensor:
    """A few positions of so many images, drawn with a fixed seed: int64 (k,), ascending."""
    generator = torch.Generator("cpu").manual_seed(SAMPLE_SEED)
    return torch.randperm(total, generator=generator, device="cpu")[:SHOWN].sort().values


def answer(
    model: nn.Module,
    chunks: Iterable[tuple[Tensor, Tensor]],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
    quiet: bool,
    title: str = "test",
    sampled: Tensor | None = None,
) -> Answers:
    """Classify every image of the chunks (uint8 images, labels), and keep the images at `sampled`.

    The title is that of the progress bar.
    """
    sampled = torch.empty(0, dtype=torch.int64, device="cpu") if sampled is None else sampled
    kept: list[Tensor] = []

    def keeping(chunks: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        begin = 0
        for pixels, labels in chunks:
            inside = sampled[(begin <= sampled) & (sampled < begin + len(labels))] - begin
            kept.append(pixels[inside.to(pixels.device)].cpu())
            begin += len(labels)
            yield pixels, labels

    bar = bars.progress(chunks, title, show=not quiet)
    found = [
        (logits.argmax(-1), labels)
        for logits, labels in classify(model, keeping(bar), preprocessing, device, precision)
    ]
    predicted, labels = map(torch.cat, zip(*found, strict=True))
    return Answers(predicted, labels, sampled, torch.cat(kept))


def write_answers(found: Answers, classes: Sequence[str], of: str, folder: Path) -> None:
    """Draw the sampled images with what the model says of them; `of` says what they are, in a line.

    Raises:
        CannotWrite: the picture cannot be written.
    """
    captions, right = [], []
    for predicted, label in zip(found.predicted[found.sampled], found.labels[found.sampled], strict=True):
        right.append(bool(predicted == label))
        captions.append(f"✓ {classes[label]}" if right[-1] else f"✗ {classes[predicted]}\nis {classes[label]}")
    title = f"{of}\n{len(right)} images drawn at random, {sum(right)} right"
    sheet = draw_sheet(found.pixels.permute(0, 2, 3, 1).numpy(), captions, title, right)
    save_figure(sheet, folder / ANSWERS)
