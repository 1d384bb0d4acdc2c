"""What a user writes, as a type checker sees it: no public name is `Any`, and a wrong argument is an error.

It is checked, never run: `pyright tests/typing`.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from typing_extensions import assert_type

import abm_vision
import nlp_ext
from abm_vision import (
    INITIALIZERS,
    VIT,
    ABMConfig,
    ABMReport,
    AlignConfig,
    AlignReport,
    Backbone,
    InformationLoss,
    Initializer,
    TrainingStep,
    WeightSource,
    add_lora,
    check_adapters,
    create_backbone,
    find_backbone,
    information_loss,
    initialize_lora,
    initialize_lora_abm_weights,
    initialize_lora_aligned_weights,
    load_adapter,
    register_backbone,
    register_initializer,
    save_adapter,
    use_merged_linear,
)
from abm_vision.tune import TuneConfig
from abm_vision.vtab import RunConfig, make_config, run
from nlp_ext.glue import GlueConfig
from nlp_ext.instruct import InstructConfig

loader = [(torch.zeros(2, 3, 70, 70), torch.zeros(2, dtype=torch.long))]


def five_lines() -> None:
    bare, source = create_backbone("vit_small_patch14_dinov2", num_classes=16, img_size=70)
    assert_type(bare, nn.Module)
    assert_type(source, WeightSource)
    model = add_lora(bare, rank=8, alpha=8, qkv="qv")
    assert_type(model, PeftModel)
    assert_type(initialize_lora_abm_weights(model, loader, ABMConfig(steps=4)), ABMReport)
    save_adapter(model, Path("adapter"))
    assert_type(load_adapter("adapter"), PeftModel)
    assert_type(load_adapter(bare, "adapter"), PeftModel)


def a_loop(model: PeftModel) -> None:
    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    check_adapters(model, loader[0])
    assert_type(TrainingStep(model, loss_fn)(loader[0]), Tensor)
    assert_type(use_merged_linear(model), int)


def initialisations(model: PeftModel) -> None:
    assert_type(initialize_lora_aligned_weights(model, loader, AlignConfig()), AlignReport)
    assert_type(initialize_lora(model, "kaiming"), ABMReport | AlignReport | None)
    assert_type(information_loss(model, loader), InformationLoss)
    assert_type(INITIALIZERS, dict[str, Initializer])
    register_initializer(INITIALIZERS["kaiming"])


def families(model: nn.Module) -> None:
    assert_type(find_backbone(model), Backbone)
    assert_type([VIT, nlp_ext.T5, nlp_ext.LLAMA], list[Backbone])
    register_backbone(VIT)
    assert_type(nlp_ext.add_lora(model), PeftModel)
    assert_type(nlp_ext.answer_tokens({"labels": torch.zeros(2, 3)}), Tensor | None)


def harnesses() -> None:
    assert_type(abm_vision.__version__, str)
    assert_type(make_config(task="dsprites_loc"), RunConfig)
    assert_type(run(make_config(task="dsprites_loc"), "results"), dict[str, Any])
    assert_type(abm_vision.tune.make_config(data="photos"), TuneConfig)
    assert_type(GlueConfig.make(task="rte"), GlueConfig)
    assert_type(InstructConfig.make(), InstructConfig)


def mistakes(model: PeftModel) -> None:
    """Each comment is itself an error where the line is none."""
    add_lora(model, rnak=8)  # pyright: ignore[reportCallIssue]
    add_lora(model, rank="8")  # pyright: ignore[reportArgumentType]
    initialize_lora_abm_weights(loader, model)  # pyright: ignore[reportArgumentType]
    initialize_lora_abm_weights(model, loader, AlignConfig())  # pyright: ignore[reportArgumentType]
    ABMConfig(stepz=4)  # pyright: ignore[reportCallIssue]
    abm_vision.add_lroa  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]  # noqa: B018
