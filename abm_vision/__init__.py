"""ABM-LoRA for timm vision transformers: LoRA initialised at the pretrained model's activation boundaries.

Nothing is loaded before it is used (PEP 562); `__init__.pyi` says where each name lies.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
