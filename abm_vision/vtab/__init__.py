"""The VTAB-1K harness: `python -m abm_vision.vtab`, or `run(make_config(...))` from Python."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from abm_vision.vtab.config import PRESETS, RunConfig, make_config

if TYPE_CHECKING:
    from abm_vision.vtab.run import run

__all__ = ["PRESETS", "RunConfig", "make_config", "run"]


class _Vtab(ModuleType):
    """`run` is the function, which loads torch and timm when it is used, and not the submodule of that name."""

    @property
    def run(self) -> Any:
        return import_module("abm_vision.vtab.run").run

    @run.setter
    def run(self, module: ModuleType) -> None:  # what importing the submodule sets
        pass


sys.modules[__name__].__class__ = _Vtab
