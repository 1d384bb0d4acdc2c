"""Pretrained language models: from the hub, a folder, a GGUF file, a package, or a tiny one pretrained here.

Nothing is loaded before it is used (PEP 562); `__init__.pyi` says where each name lies.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
