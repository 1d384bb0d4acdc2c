"""Names of modules. No torch is loaded: figures of finished runs know names alone."""

from __future__ import annotations

import re

# What torch puts into the names of modules that it wraps.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_WRAPPED = re.compile(rf"\b(?:{'|'.join(WRAPPERS)})\.")


def plain_name(name: str) -> str:
    """A module's or tensor's name without the names of torch's wrappers (`torch.compile` and others)."""
    return _WRAPPED.sub("", name)


def layer_kind(name: str) -> str:
    """What a layer is inside its block: "attn.qkv" of "blocks.3.attn.qkv"."""
    return re.sub(r"^.*\d+\.", "", name)
