"""Loading saved adapters, ours or stock peft's: what is not whole, or does not fit, is an error."""

from __future__ import annotations

import math
import os
import pickle
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from abm_vision.abm.adapter import absence, adapted_layers, check_room, guard
from abm_vision.abm.base_change import changes_base
from abm_vision.abm.files import read_object
from abm_vision.abm.host import Backbone, find_backbone, known_backbones
from abm_vision.abm.lora import UNFIT, restrict_to_blocks, settle_modes, taken_off_on_error
from abm_vision.abm.merged_linear import merged_linear_factory
from abm_vision.abm.names import plain_name
from abm_vision.abm.restore import restored
from abm_vision.abm.saving import ABM_FILE, FORMAT, PEFT_PREFIX

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
REMEDY = "save or copy the adapter again"  # of a damaged file


def load_adapter(
    model: nn.Module | str | os.PathLike[str],
    directory: str | os.PathLike[str] | None = None,
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
    merged_linear: bool = True,
    backbone: Backbone | None = None,
    weights: str | None = None,
) -> PeftModel:
    """Put a saved adapter (ours or stock peft's) on a model, ready to run or to be trained further.

    Unlike `PeftModel.from_pretrained` it makes a fused qkv run that the model would bypass, keeps the k rows of an
    adapter for q and v alone at zero, and takes files only that are whole: every tensor that the configuration asks
    for, no other one, and finite numbers. After an error the model is as it was.

    `load_adapter(directory)` builds the timm model that `abm.json` describes, on CPU, with its pretrained weights; they
    must be those that the adapter was trained on, where `abm.json` says which (`create_backbone` records it).

    Args:
        model: a bare model, or a `PeftModel` to which the adapter is added under a new name, inactive.
        directory: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        is_trainable: whether the adapter is to be trained on; frozen otherwise, as in peft.
        adapter_name: as in `add_lora`.
        merged_linear: as in `add_lora`.
        backbone: as in `add_lora`.
        weights: of a model that is built here, as in `create_backbone`; None means those that `abm.json` names.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        WeightsNotFound: an `OSError`: there are no weights for a model that is built here.
        ValueError: no model is given and `abm.json` does not describe one, the adapter is no LoRA, its files are
            damaged, they do not fit the model, or the model takes no further adapter (the name is taken, it is merged,
            compiled, on the meta device, or its base is changed).
    """
    if directory is None:
        directory, model = model, _built(model, weights)
        model.train(is_trainable)
    elif weights is not None:
        raise ValueError(f"weights is {weights!r}, and the model is given, which has weights: leave one of them out")
    folder, config = Path(directory), read_adapter_config(Path(directory))
    bare = check_room(model, adapter_name)
    backbone = backbone or find_backbone(bare)
    if changes_base(config) and (isinstance(model, PeftModel) or not _repeats(config)):
        why = "would change the base weights under the other adapters" if _repeats(config) else "cannot repeat it"
        raise ValueError(
            f"{directory} was saved raw after init {config.init_lora_weights!r}, by peft or a Trainer: loading it "
            f"{why}. Save the trained model with save_adapter"
        )
    if absence(bare):
        raise ValueError("the model is on the meta device and has no values: load its weights first")
    tensors = _read_tensors(folder)
    blocks = read_settings(folder)["qv_only"] if (folder / ABM_FILE).is_file() else []
    _check_saved_modules(tensors, bare, config, folder)
    if merged_linear:
        config._register_custom_module({nn.Linear: merged_linear_factory})
    with taken_off_on_error(model, bare, adapter_name, f"the adapter {folder}"), warnings.catch_warnings():
        # What is missing is checked below; of a module in two places (CoaT's shared MLPs) peft calls one missing.
        warnings.filterwarnings("ignore", "Found missing adapter keys")
        if isinstance(model, PeftModel):
            adapted, config.inference_mode = model, not is_trainable
            with restored(model):
                model.add_adapter(adapter_name, config)
                model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        else:
            adapted = PeftModel.from_pretrained(
                bare, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
        wanted = get_peft_model_state_dict(adapted, adapter_name=adapter_name, save_embedding_layers=False)
        _check_complete(wanted.keys(), {k for k in tensors if k in wanted or not _is_embedding(k, bare)})
        settle_modes(adapted, adapter_name)
        backbone.prepare(bare, list(adapted_layers(adapted, adapter_name)))
        _check_blocks(adapted, adapter_name, blocks, backbone)
        restrict_to_blocks(adapted, adapter_name, blocks)
    return guard(adapted)


def _repeats(config: LoraConfig) -> bool:
    """Whether peft, when it loads the file, takes the same out of the base weights: from the weights alone."""
    return str(config.init_lora_weights).lower() in ("pissa", "olora", "loftq")


def _built(directory: str | os.PathLike[str] | nn.Module, weights: str | None) -> nn.Module:
    """The model that an adapter's `abm.json` describes."""
    if isinstance(directory, nn.Module):
        raise ValueError("a model is given without the adapter's folder: load_adapter(model, folder)")
    folder = Path(directory)
    read_adapter_config(folder)
    host = read_settings(folder).get("host") if (folder / ABM_FILE).is_file() else None
    build = next((one.build for one in known_backbones() if one.name == host), None)
    if build is None:
        kind = f"a {host}, which is not built from its name" if host else "not described there"
        raise ValueError(f"the model of {folder} is {kind}: build it and pass it, load_adapter(model, folder)")
    return build(folder, weights)


def load_reference(
    model: PeftModel,
    directory: str | os.PathLike[str],
    adapter_name: str = "reference",
    *,
    backbone: Backbone | None = None,
) -> None:
    """Put the LoRA factors of a saved adapter beside those of `model`, frozen and inactive, as a source of signs.

    Its head is left out: it may be of another task. Rank and targets may differ too.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: it is no LoRA, it needs changed base weights, its file is damaged, or its layers are not this
            model's.
    """
    folder, config = Path(directory), read_adapter_config(Path(directory))
    bare = check_room(model, adapter_name)
    if changes_base(config):
        raise ValueError(
            f"{directory} was saved raw after init {config.init_lora_weights!r}, so it needs changed base weights: "
            "save it with save_adapter"
        )
    config.modules_to_save, config.inference_mode = None, True
    tensors = {name: tensor for name, tensor in _read_tensors(folder).items() if ".lora_" in name}
    with taken_off_on_error(model, bare, adapter_name, f"the reference {folder}"):
        model.add_adapter(adapter_name, config)
        set_peft_model_state_dict(model, tensors, adapter_name=adapter_name)
        wanted = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        _check_complete(wanted.keys(), tensors.keys())
        (backbone or find_backbone(bare)).prepare(bare, list(adapted_layers(model, adapter_name)))


# ------------------------------------------------------------------------------------------------------ files, checked


def _check_saved_modules(tensors: Mapping[str, Tensor], bare: nn.Module, config: LoraConfig, folder: Path) -> None:
    """Raise a ValueError unless what is not LoRA in a file is just the modules that its configuration saves.

    Base weights peft would write into the model in silence; of a module that is missing it says nothing of use.
    """
    saved = {plain_name(n): m for n, m in bare.named_modules() if n.endswith(tuple(config.modules_to_save or ()))}
    wanted = {
        f"{PEFT_PREFIX}{name}.{key}"
        for name, module in saved.items()
        for key in getattr(module, "original_module", module).state_dict()
    }
    if wanted - tensors.keys():
        raise ValueError(f"{folder / WEIGHTS} lacks {_some(sorted(wanted - tensors.keys()))}: {REMEDY}")
    surplus = {
        key
        for key in tensors.keys() - wanted
        if ".lora_" not in key
        and not _is_embedding(key, bare)
        and not (config.bias != "none" and key.endswith(".bias"))
    }
    if surplus:
        raise ValueError(
            f"{folder / WEIGHTS} holds {_some(sorted(surplus))}, of no LoRA layer and of no module that its "
            f"configuration saves ({', '.join(config.modules_to_save or ()) or 'none'}): {REMEDY}"
        )


def _is_embedding(key: str, bare: nn.Module) -> bool:
    """Whether a tensor is of a language model's embedding or output layer, which peft saves where they were resized."""
    if not hasattr(bare, "get_input_embeddings"):
        return False
    layers = [bare.get_input_embeddings(), bare.get_output_embeddings()]
    names = [plain_name(n) for n, m in bare.named_modules() if any(m is layer for layer in layers)]
    return any(key.removeprefix(PEFT_PREFIX).startswith(f"{name}.") for name in names)


def _check_complete(wanted: Iterable[str], given: Iterable[str]) -> None:
    """Raise a ValueError unless both are the same names."""
    missing, surplus = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing:
        raise ValueError(f"its file lacks {_some(missing)}")
    if surplus:
        raise ValueError(f"the model lacks the layers of {_some(surplus)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_blocks(model: PeftModel, adapter_name: str, names: list[str], backbone: Backbone) -> None:
    """Raise a ValueError unless the layers are fused ones of q, k and v, of even rank: half for q, half for v."""
    layers = adapted_layers(model, adapter_name)
    fused = {plain_name(name) for name in backbone.fused_qkv(model.get_base_model())}
    for name in names:
        if name not in layers or name not in fused or layers[name].r[adapter_name] % 2:
            raise ValueError(f"{ABM_FILE} says that {name} adapts q and v alone, and it is no adapted fused qkv here")


# What decides an adapter's function, and has stood in every version's files.
_REQUIRED: Mapping[str, tuple[type, ...]] = {"r": (int,), "lora_alpha": (int, float), "target_modules": (list, str)}
_TYPES: Mapping[str, tuple[type, ...]] = {
    **_REQUIRED,
    "target_modules": (list, str, type(None)),  # null beside target_parameters
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "fan_in_fan_out": (bool,),
    "modules_to_save": (list, type(None)),
    "bias": (str,),
}


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a saved LoRA adapter; raises FileNotFoundError and ValueError."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"no {CONFIG} in {folder}: pass a folder that save_adapter wrote")
    content = read_object(path, REMEDY)
    if content.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {content.get('peft_type')!r}; only LoRA adapters can be loaded")
    if not any((folder / name).is_file() for name in (WEIGHTS, PICKLE)):  # peft would ask a hub for it
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}: pass a folder that save_adapter wrote")
    absent = [name for name in _REQUIRED if name not in content and not content.get("target_parameters")]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}, which decides what the adapter computes: {REMEDY}")
    for name, kinds in _TYPES.items():
        value = content.get(name)
        if name in content and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise ValueError(f"{path} has {name} {value!r}, it must be {_words(kinds)}: {REMEDY}")
    numbers = {"lora_alpha": content.get("lora_alpha"), **content.get("alpha_pattern", {})}
    for name, value in numbers.items():
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ValueError(f"{path} has alpha {value!r} for {name}, it must be a finite number: {REMEDY}")
    if not 0 <= content.get("lora_dropout", 0) < 1:
        raise ValueError(f"{path} has lora_dropout {content['lora_dropout']}, it must lie in [0, 1): {REMEDY}")
    if not all(isinstance(name, str) for name in content.get("modules_to_save") or ()):
        raise ValueError(f"{path} has modules_to_save {content['modules_to_save']!r}, it must hold names: {REMEDY}")
    try:
        return PeftConfig.from_pretrained(str(folder))
    except UNFIT as error:
        raise ValueError(f"{path} is no configuration of LoRA ({error}): {REMEDY}") from error


def _words(kinds: tuple[type, ...]) -> str:
    names = {int: "a whole number", float: "a number", list: "a list", str: "a string", dict: "an object"}
    return " or ".join({**names, bool: "true or false", type(None): "null"}[kind] for kind in kinds)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """A saved adapter's tensors, on CPU; a ValueError where they cannot be read or are not finite."""
    path = folder / WEIGHTS
    try:
        if path.is_file():
            tensors = load_file(path)
        else:
            path = folder / PICKLE
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read: damaged, or pickled objects, which are never loaded. Save it as {WEIGHTS}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no table of tensors: {REMEDY}")
    for name, tensor in tensors.items():
        if not tensor.float().isfinite().all():  # float8 cannot be asked
            raise ValueError(f"{path}: {name} is NaN or infinite: {REMEDY}")
    return tensors


def read_settings(folder: Path) -> dict[str, Any]:
    """The content of an adapter's `abm.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was written in another format.
    """
    path = folder / ABM_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no {ABM_FILE} in {folder}: pass the folder of a finished run, or its adapter folder")
    settings = read_object(path, REMEDY)
    if settings.get("format") != FORMAT:
        raise ValueError(f"{path} has format {settings.get('format')}, this version reads {FORMAT}")
    names = settings.get("qv_only")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path} has qv_only {names!r}, it must be a list of module names: {REMEDY}")
    return settings
