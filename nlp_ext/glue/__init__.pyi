from .config import GlueConfig
from .harness import HARNESS, run

__all__ = ["HARNESS", "GlueConfig", "run"]
