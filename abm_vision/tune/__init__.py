"""One's own images: `python -m abm_vision.tune my/photos`, or `run(make_config(data="my/photos"))` from Python.

Nothing is loaded before it is used (PEP 562); `__init__.pyi` says where each name lies.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
