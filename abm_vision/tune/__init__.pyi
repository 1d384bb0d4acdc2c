from .config import TuneConfig, make_config
from .harness import HARNESS, run

__all__ = ["HARNESS", "TuneConfig", "make_config", "run"]
