"""Every start of a LoRA adapter that the harness knows: one table."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from abm_vision.abm.config import ABMConfig
from abm_vision.abm.initialize import initialize_lora_abm_weights
from abm_vision.abm.report import ABMReport

Apply = Callable[[PeftModel, Iterable[Any], ABMConfig, bool], ABMReport | None]


@dataclass(frozen=True)
class Initializer:
    """One start.

    Args:
        name: what `--init` takes.
        summary: one line for people.
        source: the paper.
        apply: (model fresh from `add_lora`, batches, settings, show progress) changes the adapter in place.
    """

    name: str
    summary: str
    source: str
    apply: Apply


def _keep(model: PeftModel, batches: Iterable[Any], config: ABMConfig, progress: bool) -> None:
    """`add_lora` has drawn A as peft does, and B is zero."""


def _match_boundaries(model: PeftModel, batches: Iterable[Any], config: ABMConfig, progress: bool) -> ABMReport:
    return initialize_lora_abm_weights(model, batches, config, show_progress_bar=progress)


INITIALIZERS: Mapping[str, Initializer] = {
    start.name: start
    for start in (
        Initializer("kaiming", "peft's default: A Kaiming-uniform, B zero", "arXiv:2106.09685", _keep),
        Initializer("abm", "boundaries matched to the pretrained model's", "arXiv:2511.19145", _match_boundaries),
    )
}


def get_initializer(name: str) -> Initializer:
    """The start of that name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if name not in INITIALIZERS:
        near = difflib.get_close_matches(name, INITIALIZERS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"init is {name!r}; allowed are {', '.join(INITIALIZERS)}{hint}")
    return INITIALIZERS[name]
