from .gguf import fetch
from .load import Weights, check_model, load_model, model_content, model_folder

__all__ = ["Weights", "check_model", "fetch", "load_model", "model_content", "model_folder"]
