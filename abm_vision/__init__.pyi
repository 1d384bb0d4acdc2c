# The public names and where they lie: `__init__.py` loads them on first use, type checkers read them here.
from . import abm, analysis, images, initializers, runs, tune, vtab
from .abm.align import AlignReport, initialize_lora_aligned_weights
from .abm.checks import check_adapters
from .abm.host import Backbone, find_backbone, register_backbone
from .abm.loading import load_adapter
from .abm.lora import add_lora
from .abm.match import initialize_lora_abm_weights
from .abm.report import ABMReport
from .abm.saving import push_to_hub, save_adapter
from .abm.settings import ABMConfig, AlignConfig
from .abm.step import TrainingStep
from .abm.swap import use_merged_linear
from .abm.tangent import InformationLoss, information_loss
from .initializers import INITIALIZERS, Initializer, initialize_lora, register_initializer
from .live import LivePlot
from .vit import VIT
from .weights import WeightSource, create_backbone

__version__: str

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
    "TrainingStep",
    "WeightSource",
    "abm",
    "add_lora",
    "analysis",
    "check_adapters",
    "create_backbone",
    "find_backbone",
    "images",
    "information_loss",
    "initialize_lora",
    "initialize_lora_abm_weights",
    "initialize_lora_aligned_weights",
    "initializers",
    "load_adapter",
    "push_to_hub",
    "register_backbone",
    "register_initializer",
    "runs",
    "save_adapter",
    "tune",
    "use_merged_linear",
    "vtab",
]
