from .config import InstructConfig
from .harness import HARNESS, run

__all__ = ["HARNESS", "InstructConfig", "run"]
