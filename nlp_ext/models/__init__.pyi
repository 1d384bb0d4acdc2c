from .gguf import fetch
from .load import Weights, load_model, model_content, model_folder

__all__ = ["Weights", "fetch", "load_model", "model_content", "model_folder"]
