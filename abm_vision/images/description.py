"""What an adapter's `abm.json` and model card say of the timm model that it is for; and that model, built again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import nn

from abm_vision.abm.base_change import ROUNDING
from abm_vision.abm.loading import read_settings
from abm_vision.abm.merged_linear import is_plain
from abm_vision.abm.saving import ABM_FILE
from abm_vision.images.records import Shape, Weights
from abm_vision.runs.records import Count, Positive, Record, checked

UNFIT = "it is damaged, or its model was not described: save the adapter again with save_adapter"


class Run(Record):
    """Settings of the run that the adapter is from."""

    model: str
    weights: str
    seed: Count
    task: str
    init: str


class Description(Record):
    """What `abm.json` says of a timm model; other entries are of the adapter itself.

    Args:
        model: timm's name, with its tag.
        model_args: what `timm.create_model` is given beside the number of classes.
        hub: the base model on the hub.
        license: of the base model.
        num_classes, classes: outputs, and their names in that order.
        preprocessing: how images are made into the model's input.
        weights: where the base weights are from; None where the model was not made by `create_backbone`.
        init: the initialisation.
        versions: of the libraries that saved it.
        run, data_source: of a run.
    """

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)
    model: str
    model_args: dict[str, Positive] = Field(default={})
    hub: str | None = None
    license: str | None = None
    num_classes: Positive
    classes: list[str] | None = None
    preprocessing: Shape
    weights: Weights | None = None
    init: str | None = None
    versions: dict[str, str | None] = Field(default={})
    run: Run | None = None
    data_source: str | None = None

    @model_validator(mode="after")
    def _a_name_each(self) -> Description:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} classes are named, the model has {self.num_classes}")
        if self.run and not (self.weights and self.data_source):
            raise ValueError("a run says where its weights and data_source are from")
        return self


def describe(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """What `abm.json` says of a timm model: what `save_adapter` was given, else what timm records with the model.

    Raises:
        ValueError: what was given does not fit the model.
    """
    recorded, made = getattr(model, "pretrained_cfg", None) or {}, getattr(model, "made_from", {})
    facts: dict[str, Any] = {"num_classes": getattr(model, "num_classes", 0)}  # of features alone there are none
    facts["init"] = (given.get("run") or {}).get("init")
    built = _built_for(model)
    at = built if recorded.get("fixed_input_size") else None  # set_input_size may have changed it since
    size = at or made.get("image_size") or built or recorded.get("input_size", (None,))[-1]
    if recorded.get("architecture"):
        tag = f".{recorded['tag']}" if recorded.get("tag") else ""
        facts["model"] = recorded["architecture"] + tag
        facts["model_args"] = {"img_size": size} if recorded.get("fixed_input_size") and size else {}
        facts["hub"], facts["license"] = recorded.get("hf_hub_id"), recorded.get("license")
        facts["weights"] = made.get("weights")
        if reason := facts["num_classes"] and _why_not_built_again(model, facts["model"], facts["num_classes"], size):
            facts["model"], facts["model_args"] = None, {}
            warnings.warn(
                f"load_adapter(folder) will not be able to build the model: {reason}. Keep the code that makes it, and "
                "call load_adapter(model, folder)",
                stacklevel=4,
            )
        facts["preprocessing"] = {
            "image_size": size,
            **{name: recorded.get(name) for name in ("interpolation", "crop_pct", "crop_mode")},
            **{name: list(recorded.get(name) or ()) for name in ("mean", "std")},
        }
    facts = {**facts, **given}
    if "preprocessing" in given:
        if not isinstance(given["preprocessing"], Mapping):
            raise ValueError(f"preprocessing is {given['preprocessing']!r}, it must be a dictionary: {_fields()}")
        shape = {k: list(v) if isinstance(v, tuple) else v for k, v in given["preprocessing"].items()}
        checked(shape, Shape, "preprocessing", f"it has {_fields()}")
        facts["preprocessing"] = Shape(**shape).model_dump()
    names = given.get("classes")
    if names is not None and (not all(isinstance(n, str) for n in names) or len(names) != model.num_classes):
        raise ValueError(f"classes are {names!r}; give the name of each of the model's {model.num_classes} classes")
    return facts


_WRAPPERS = re.compile(r"\.(?:base_layer|original_module)\b")  # of peft
_OF_PEFT = re.compile(r"\.(?:lora_\w+|modules_to_save)\b")
# What a model does not compute with in evaluation mode, or this package sets.
_FREE = {
    *("training", "p", "drop_prob", "drop_rate", "inplace", "fused_attn", "grad_checkpointing"),
    *("distilled_training", "qkv_bias_separate"),
}


def _why_not_built_again(model: nn.Module, name: str, num_classes: int, size: int | None) -> str | None:
    """What of a model is not as `create_backbone` builds it: another pooling or activation, a layer replaced."""
    from abm_vision.weights import base_sums, dry_run

    try:
        fresh, _ = dry_run(name, num_classes, size, 0.0)
    except (ValueError, RuntimeError) as error:  # timm knows no such tag, say
        return str(error).rstrip(".")
    paths = ((_WRAPPERS.sub("", path), module) for path, module in model.named_modules())
    found = {path: module for path, module in paths if not _OF_PEFT.search(path)}  # what is wrapped comes last
    expected = dict(fresh.named_modules())
    for path, there in found.items():
        if path not in expected and any(True for _ in there.parameters(recurse=False)):
            return f"timm's {name} has no {path}"
    for path, module in expected.items():
        if difference := _difference(found.get(path), module):
            return f"{path or type(model).__name__} {difference[0]}, and {difference[1]} in timm's {name}"
    before, now = getattr(model, "made_from", {}).get("sums"), base_sums(model)
    if before and now and any(abs(a - b) > ROUNDING * now[1] for a, b in zip(before, now, strict=True)):
        return "its base weights are no longer those that create_backbone loaded"
    return None


def _difference(there: nn.Module | None, module: nn.Module) -> tuple[str, str] | None:
    """What a module is, and what timm's is; None if they are the same."""
    if isinstance(module, nn.Identity) and "Drop" in type(there).__name__:  # nothing in evaluation mode
        return None
    if type(there) is not type(module):
        weight = getattr(there, "weight", None)
        quantised = isinstance(there, type(module)) and weight is not None and not is_plain(weight)
        return None if quantised else (f"is a {_class_of(there)}", f"a {_class_of(module)}")
    for kept in (module._parameters, module._buffers):
        for key, tensor in kept.items():
            shapes = [None if t is None else tuple(t.shape) for t in (getattr(there, key, None), tensor)]
            if shapes[0] != shapes[1]:
                return f"has {key} of shape {shapes[0]}", f"of {shapes[1]}"
    for key, value in vars(module).items():
        if key not in _FREE and isinstance(value, (bool, int, float, str)) and vars(there).get(key) != value:
            return f"has {key} {vars(there).get(key)!r}", f"{value!r}"
    return None


def _class_of(module: nn.Module | None) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def of_run(result: Mapping[str, Any], task: str) -> dict[str, Any]:
    """What a run on images says of its adapter, for `predict` and `evaluate`."""
    return {
        "run": {"task": task, **{name: result["config"][name] for name in ("model", "weights", "init", "seed")}},
        **{name: result[name] for name in ("num_classes", "weights", "preprocessing", "test")},
        "data_source": result["data"]["train"]["source"],
        "report": result["abm"],
    }


def _fields() -> str:
    return ", ".join(Shape.model_fields)


def _built_for(model: nn.Module) -> int | None:
    """The side of the square images that a model of fixed size was built for, in pixels."""
    sizes = (getattr(module, "img_size", None) for module in model.modules())  # of its (first) patch embedding
    size = next((size for size in sizes if size), None)
    return size[0] if isinstance(size, tuple) and size[0] == size[-1] else None


def read_description(folder: Path) -> dict[str, Any]:
    """The `Description` in an adapter's folder, and what else its `abm.json` holds.

    Raises:
        FileNotFoundError: there is no `abm.json`.
        ValueError: it does not describe a timm model, or is damaged.
    """
    settings = read_settings(folder)
    if "run" in settings and "model" not in settings:  # runs of earlier versions
        settings["model"] = settings["run"].get("model") if isinstance(settings["run"], dict) else None
    if settings.get("model") is None:
        raise ValueError(
            f"{folder / ABM_FILE} does not say which timm model the adapter is for: it was not written by a run, or "
            "was saved from a model that timm.create_model did not make, or made with other arguments: build the model "
            "and pass it, load_adapter(model, folder)"
        )
    return checked(settings, Description, str(folder / ABM_FILE), UNFIT)


def build(folder: Path, weights: str | None = None) -> nn.Module:
    """The model of an adapter with its pretrained weights, as `create_backbone` makes it.

    Args:
        folder: the adapter's.
        weights: as in `create_backbone`; None means those that it was saved with.

    Raises:
        FileNotFoundError, ValueError: `abm.json` is missing or does not describe a model, or other weights are found.
        WeightsNotFound: there are none.
    """
    from abm_vision.weights import create_backbone

    settings = read_description(folder)
    recorded, run = settings.get("weights"), settings.get("run")
    if weights is None and run is None and recorded and recorded["origin"] == "none":
        raise ValueError(
            f"{folder} was trained on random weights, which nobody has any more: pass the model, "
            "load_adapter(model, folder)"
        )
    if weights is None and not recorded:
        warnings.warn(
            f"{folder} does not say which weights it was trained on, since create_backbone did not make its model: "
            "timm's pretrained ones are taken. If it was trained on others, pass them as weights, or the model",
            stacklevel=4,
        )
    if weights is None:
        of_file = recorded["location"] if recorded and recorded["origin"] == "file" else "auto"
        weights = run["weights"] if run else of_file
    with torch.random.fork_rng(devices=[]):
        if run:
            torch.manual_seed(run["seed"])  # a run on random weights drew them from its seed
        size = settings["preprocessing"]["image_size"]
        model, source = create_backbone(settings["model"], settings["num_classes"], size, weights)
    if recorded and source.sha256 != recorded["sha256"]:
        raise ValueError(
            f"{folder} was trained on {recorded['location']} (sha256 {recorded['sha256']}), found was {source}: pass "
            "the same weights"
        )
    return model
