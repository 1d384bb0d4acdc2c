"""A run before its start: data, pretrained weights and the adapted model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

import vtab_tasks
from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.runs.device import resolve_device
from abm_vision.runs.order import diagnosis_batches
from abm_vision.runs.start import Say, settle_device, stopwatch
from abm_vision.vtab.config import EVALUATIONS, RunConfig
from abm_vision.vtab.data import Images, Preprocessing, data_record, load_all, preprocessing_for
from abm_vision.vtab.train import choose_attention
from abm_vision.weights import WeightSource, create_backbone

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

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that is taken up again must find unchanged."""
        data = {"train_data": data_record(self.train_data), "test_data": data_record(self.test_data)}
        return {**data, "weights": asdict(self.weights)}

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
        train_split, test_split = EVALUATIONS[config.evaluate]
        train_data, test_data = _load(config, train_split), _load(config, test_split)
        split_size = len(test_data)
        if 0 < config.test_images < len(test_data):
            test_data = test_data.subset(config.test_images, TEST_SUBSET_SEED)
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


def _load(config: RunConfig, split: str) -> vtab_tasks.TaskData:
    return vtab_tasks.load(config.task, split, source=config.source, data_dir=config.data_dir)


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
