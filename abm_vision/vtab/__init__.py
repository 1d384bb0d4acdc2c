"""The VTAB-1K harness: `python -m abm_vision.vtab`, or `run(make_config(...))` from Python."""

from abm_vision.vtab.config import PRESETS, RunConfig, make_config
from abm_vision.vtab.run import run

__all__ = ["PRESETS", "RunConfig", "make_config", "run"]
