from .config import PRESETS, RunConfig, make_config
from .harness import HARNESS, run

__all__ = ["HARNESS", "PRESETS", "RunConfig", "make_config", "run"]
