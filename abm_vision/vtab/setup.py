"""A run before its start: data, pretrained weights and the adapted model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

import vtab_tasks
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.lora import add_lora
from abm_vision.runs.content import Origin, initialisation, remembered
from abm_vision.runs.device import resolve_device
from abm_vision.runs.order import diagnosis_batches
from abm_vision.runs.start import Say, settle_device, stopwatch
from abm_vision.vtab.config import EVALUATIONS, RunConfig, make_config
from abm_vision.vtab.data import Images, Preprocessing, load_all, preprocessing_for
from abm_vision.vtab.train import choose_attention
from abm_vision.weights import WeightSource, create_backbone, find_weights
from vtab_tasks.content import content

TEST_SUBSET_SEED = 0  # a subset of the test split is the same for every run


@dataclass
class Setup:
    """A run before its start: the adapted model, the data, and what is to be recorded of them."""

    config: RunConfig
    model: PeftModel
    images: Images
    train_data: vtab_tasks.TaskData
    test_data: vtab_tasks.TaskData
    split_size: int  # images in the split that test_data is from
    preprocessing: Preprocessing
    weights: WeightSource
    device: torch.device
    precision: str
    seconds: dict[str, float]

    @cached_property
    def origin(self) -> Origin:
        """The content that a run that is resumed must find unchanged."""
        data = {**_data_origin("training", self.train_data), **_data_origin("test", self.test_data)}
        return {**data, **_weights_origin(self.weights), **initialisation(self.config)}

    @property
    def weights_sha256(self) -> str:
        """What a tuned reference must have been tuned on."""
        return self.weights.sha256

    @property
    def backbone(self) -> Backbone:
        """The model's record."""
        return find_backbone(self.model)

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The shuffled training set, for the start."""
        return self.images.batches(min(self.config.batch_size, self.config.abm_samples), self.config.seed, 0)

    def diagnosis(self, seen: bool) -> list[tuple[Tensor, Tensor]]:
        """Batches to measure information loss on."""
        batches = diagnosis_batches(len(self.images), self.config.abm_samples, self.config.seed, seen)
        return [self.images.select(indices) for indices in batches]


def prepare(config: RunConfig, folder: Path, say: Say) -> Setup:
    device = resolve_device(config.device)
    precision = settle_device(device, config, folder, say)
    seconds: dict[str, float] = {}
    stage = stopwatch(seconds)
    with stage("data"):
        (train_data, _), (test_data, split_size) = _load(config, "training"), _load(config, "test")
        test_split = test_data.split
        say(f"data      {train_data.description}; {len(train_data)} training and {len(test_data)} {test_split} images")
    with stage("weights"):
        torch.manual_seed(config.seed)
        num_classes = train_data.task.num_classes
        backbone, weights = create_backbone(
            config.model, num_classes, config.image_size, config.weights, drop_path_rate=config.drop_path
        )
        preprocessing = preprocessing_for(backbone, config.image_size, config.normalisation, config.interpolation)
        say(f"weights   {weights}")
    with stage("data"):
        images = Images(*load_all(train_data, preprocessing), preprocessing, device)
    with stage("lora"):
        model = _adapted(backbone, config, images, device)
    choose_attention(model, device, precision)
    return Setup(
        config, model, images, train_data, test_data, split_size, preprocessing, weights, device, precision, seconds
    )


def origin_parts(
    config: RunConfig, known: dict[tuple[RunConfig, str], Origin] | None = None
) -> list[Callable[[], Origin]]:
    """What gives the content that a run of this configuration would be made of now, part by part.

    No model is built, no network asked. Each raises an OSError if its part is not there, and a ValueError if it is
    damaged.

    Args:
        config: the settings.
        known: what was found of the data of runs, to be added to: those of a suite share theirs.
    """
    fields = ("task", "evaluate", "source", "data_dir", "test_images")
    key = make_config(**{name: getattr(config, name) for name in fields})
    known = {} if known is None else known

    def data(part: str) -> Origin:
        if (key, part) not in known:
            known[key, part] = _data_origin(part, _load(config, part)[0])
        return known[key, part]

    def weights() -> Origin:
        return _weights_origin(find_weights(config.model, config.weights))

    return [partial(data, "training"), partial(data, "test"), weights, partial(initialisation, config)]


def _data_origin(part: str, data: vtab_tasks.TaskData) -> Origin:
    return {f"{part} {name}": found for name, found in content(data, remembered).items()}


def _weights_origin(weights: WeightSource) -> Origin:
    return {"weights": f"sha256 {weights.sha256}" if weights.sha256 else "random"}


def _load(config: RunConfig, part: str) -> tuple[vtab_tasks.TaskData, int]:
    """Training or test data, and how many images their split has."""
    split = dict(zip(("training", "test"), EVALUATIONS[config.evaluate], strict=True))[part]
    data = vtab_tasks.load(config.task, split, source=config.source, data_dir=config.data_dir)
    if part == "test" and 0 < config.test_images < len(data):
        return data.subset(config.test_images, TEST_SUBSET_SEED), len(data)
    return data, len(data)


def _adapted(backbone: torch.nn.Module, config: RunConfig, images: Images, device: torch.device) -> PeftModel:
    torch.manual_seed(config.seed)
    model = add_lora(
        backbone,
        config.rank,
        config.alpha,
        targets=config.lora_targets(),
        qkv=config.qkv,
        dropout=config.dropout,
    ).to(device)
    pixels, _ = next(images.batches(2, config.seed, 0))
    check_adapters(model.eval(), pixels)
    return model
