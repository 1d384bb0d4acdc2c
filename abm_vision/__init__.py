"""ABM-LoRA for timm vision transformers: LoRA that starts at the pretrained model's activation boundaries."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from abm_vision.abm.align import AlignReport, initialize_lora_aligned_weights
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.host import Backbone, find_backbone, register_backbone
from abm_vision.abm.loading import load_adapter
from abm_vision.abm.lora import add_lora
from abm_vision.abm.match import initialize_lora_abm_weights
from abm_vision.abm.report import ABMReport
from abm_vision.abm.saving import save_adapter
from abm_vision.abm.settings import ABMConfig, AlignConfig
from abm_vision.abm.tangent import InformationLoss, information_loss
from abm_vision.initializers import INITIALIZERS, Initializer, initialize_lora
from abm_vision.vit import VIT

if TYPE_CHECKING:
    from abm_vision.live import LivePlot
    from abm_vision.weights import WeightSource, create_backbone

register_backbone(VIT)

# Loaded on first use: the core and its other hosts do without timm, and whoever is not in a notebook without IPython.
_LATER = {"LivePlot": "live", "WeightSource": "weights", "create_backbone": "weights"}

__all__ = [
    "INITIALIZERS",
    "VIT",
    "ABMConfig",
    "ABMReport",
    "AlignConfig",
    "AlignReport",
    "Backbone",
    "InformationLoss",
    "Initializer",
    "LivePlot",
    "WeightSource",
    "add_lora",
    "check_adapters",
    "create_backbone",
    "find_backbone",
    "information_loss",
    "initialize_lora",
    "initialize_lora_abm_weights",
    "initialize_lora_aligned_weights",
    "load_adapter",
    "register_backbone",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"abm_vision.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
