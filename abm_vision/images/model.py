"""The model of a run on images: pretrained, adapted, on the device."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import nn

from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.images.data import Images, Preprocessing, preprocessing_for
from abm_vision.images.train import choose_attention
from abm_vision.runs.content import Origin
from abm_vision.runs.harness import Run
from abm_vision.weights import WeightSource, create_backbone, find_weights


def pretrained(run: Run, num_classes: int) -> tuple[nn.Module, WeightSource, Preprocessing]:
    """The model with a fresh head, where its weights are from, and how it takes images.

    Raises:
        ValueError, FileNotFoundError, WeightsNotFound: as `create_backbone`.
    """
    config = run.config
    with run.stage("weights"):
        torch.manual_seed(config.seed)
        backbone, weights = create_backbone(
            config.model, num_classes, config.image_size, config.weights, drop_path_rate=config.drop_path
        )
        preprocessing = preprocessing_for(backbone, config.image_size, config.normalisation, config.interpolation)
        run.session.say(f"weights   {weights}")
    return backbone, weights, preprocessing


def adapted(run: Run, backbone: nn.Module, images: Images) -> PeftModel:
    """The model with LoRA, on the device, checked on two of the images.

    Raises:
        ValueError: the settings do not fit the model.
    """
    config = run.config
    if config.step == "graph" and run.device.type != "cuda":
        raise ValueError(f"step is 'graph', but the device is {run.device}: CUDA alone has graphs; use auto or eager")
    with run.stage("lora"):
        torch.manual_seed(config.seed)
        model = add_lora(
            backbone,
            config.rank,
            config.alpha,
            targets=config.lora_targets(),
            qkv=config.qkv,
            dropout=config.dropout,
        ).to(run.device)
        pixels, _ = next(images.batches(2, config.seed, 0))
        check_adapters(model.eval(), pixels)
    choose_attention(model, run.device, run.precision)
    return model


def weights_origin(weights: WeightSource) -> Origin:
    """The weights as a part of a run's origin."""
    return {"weights": f"sha256 {weights.sha256}" if weights.sha256 else "random"}


def found_weights(model: str, weights: str) -> Origin:
    """The same of those that this machine has now, without loading them."""
    return weights_origin(find_weights(model, weights))
