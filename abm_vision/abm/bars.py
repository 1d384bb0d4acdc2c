"""Progress bars where somebody watches: in a terminal and in Jupyter, not in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def watched() -> bool:
    """Whether standard error is a terminal, or this is a Jupyter kernel (whose streams are none)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return sys.stderr.isatty() or hasattr(shell, "kernel")


def progress(items: Iterable[T], title: str, *, show: bool, **options: Any) -> tqdm[T]:
    """tqdm over `items`; without a bar unless `show` and somebody watches. `options` are tqdm's."""
    return tqdm(items, title, disable=not (show and watched()), **options)
