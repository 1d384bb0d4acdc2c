"""Small datasets written by TFDS's official builder classes, for the tests."""

import io
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import vtab_tasks
from vtab_tasks.tasks import Edition, Part, Task

BUILDERS = sorted({task.tfds_name for task in vtab_tasks.TASKS.values()})
COLOUR = "the image's colour"  # key, in a generated example, of (r, g, b) as it is to be read
# Examples in TFDS's splits; every task's slices lie in the first 30 of a split.
SIZE = 30
_TRAIN_ONLY = {"dsprites": ["train"], "eurosat/rgb": ["train"], "resisc45": ["train"]}
_TRAIN_TEST = dict.fromkeys(
    ["caltech101", "cifar100", "oxford_iiit_pet", "svhn_cropped", "smallnorb"], ["train", "test"]
)
SPLITS_OF = {**_TRAIN_ONLY, **_TRAIN_TEST}


def small_edition(task: Task) -> Task:
    """The task with its slices moved into splits of `SIZE` examples: 8 training, 4 validation, 9 test images."""
    official = task.editions[0]
    val = Part(official.val200.split, 8, 12) if official.val200.split == "train" else Part(official.val200.split, 0, 4)
    test = Part(official.test.split, SIZE - 9, SIZE)
    sizes = tuple((name, SIZE) for name, _ in official.sizes)
    return replace(task, editions=(Edition(sizes, Part("train", 0, 8), val, test),))


def write_official(name: str, data_dir, size: int = SIZE) -> dict[str, list[dict]]:
    """Prepare dataset `name` from generated examples. Returns them by split, in the order in which TFDS stores them.

    Images are handed over encoded, because TFDS encodes arrays with TensorFlow.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    hashing = pytest.importorskip("tensorflow_datasets.core.hashing")
    splits = SPLITS_OF.get(name, ["train", "validation", "test"])
    builder_name, _, config = name.partition("/")
    official = tfds.builder_cls(builder_name)
    settings = {"config": config} if config else {}
    builder = official(data_dir=data_dir, file_format="array_record", **settings)
    made = {split: make_examples(builder.info.features, size, seed) for seed, split in enumerate(splits)}
    with pytest.MonkeyPatch.context() as patch:
        generators = {split: as_tfds(examples) for split, examples in made.items()}
        patch.setattr(official, "_split_generators", lambda *a, **k: generators)
        builder.download_and_prepare()
    return {
        split: [examples[key] for key in sorted(range(size), key=hashing.Hasher(split).hash_key)]
        for split, examples in made.items()
    }


def as_tfds(examples: list[dict]) -> Iterator[tuple[int, dict]]:
    """(key, example) pairs as a builder yields them."""
    return ((key, {k: v for k, v in e.items() if k != COLOUR}) for key, e in enumerate(examples))


def make_examples(features, size: int, seed: int) -> list[dict]:
    """Random examples with these features, each with its image's colour."""
    tfds = pytest.importorskip("tensorflow_datasets")
    random = np.random.default_rng(seed)
    examples = []
    for _ in range(size):
        colour = random.integers(0, 256, 3)
        example = {name: _value(feature, tfds, random, colour) for name, feature in features.items()}
        if features["image"].shape[-1] == 1:
            scale = 255 if features["image"].shape == (64, 64, 1) else 1  # dSprites: 0 and 1
            colour = np.repeat(colour[:1] % 2 * 255 if scale == 255 else colour[:1], 3)
        examples.append({**example, COLOUR: tuple(int(c) for c in colour)})
    return examples


def _value(feature, tfds, random, colour):
    """A random value of any feature that the 16 datasets have; images are of one colour."""
    kinds = tfds.features
    if isinstance(feature, kinds.Image):
        return _encoded(feature, random, colour)
    if isinstance(feature, kinds.ClassLabel):
        return int(random.integers(feature.num_classes))
    if isinstance(feature, kinds.BBoxFeature):
        return kinds.BBox(0.1, 0.2, 0.3, 0.4)
    if isinstance(feature, kinds.Text):
        return "text"
    if isinstance(feature, kinds.Sequence):
        count = int(random.integers(3, 11))
        return [{k: _value(f, tfds, random, colour) for k, f in feature.feature.items()} for _ in range(count)]
    values = random.uniform(6, 25, feature.shape)
    return np.asarray(values, dtype=feature.np_dtype)


def _encoded(feature, random, colour) -> io.BytesIO:
    height, width = (int(random.integers(20, 60)) if side is None else side for side in feature.shape[:2])
    if feature.shape[-1] == 1:
        grey = int(colour[0]) % 2 if feature.shape == (64, 64, 1) else int(colour[0])
        image = Image.new("L", (width, height), grey)
    else:
        image = Image.new("RGB", (width, height), tuple(int(c) for c in colour))
    stream = io.BytesIO()
    image.save(stream, "JPEG" if feature.encoding_format == "jpeg" else "PNG", quality=95)
    stream.seek(0)
    return stream
