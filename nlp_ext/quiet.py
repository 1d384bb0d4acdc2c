"""Silence transformers and datasets beside a command's own output."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import huggingface_hub
import transformers


@contextmanager
def only_our_own_words() -> Iterator[None]:
    """Switch off their progress bars, advice and warnings; errors are still raised."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|peft|trl)\b.*")
        yield
