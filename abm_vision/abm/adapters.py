"""Saved adapters: stock peft's files, and `abm.json` beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.abm.checks import guard_saved_modules, modes_given_back
from abm_vision.abm.conversion import as_plain_lora, changes_base
from abm_vision.abm.files import read_object, write_json, writing
from abm_vision.abm.lora import bare_model, restrict_to_blocks
from abm_vision.abm.merged_linear import BlockLinear, merged_linear_factory

ABM_FILE, FORMAT = "abm.json", 1
REMEDY = "save or copy the adapter again"  # of a damaged file


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> None:
    """`model.save_pretrained` (stock peft's files), and beside them `abm.json` with what peft has no word for.

    An adapter that `initialize_lora` started by changing the base weights (PiSSA and others) is written as a plain
    one of twice the rank, for the untouched base.

    Args:
        model: the adapted model.
        directory: made if it does not exist.
        state_dict: what the model cannot give by itself, as in peft: the parameters of a sharded one (FSDP), whole.
        settings: JSON values to keep in the active adapter's `abm.json`, such as `report=report.to_dict()`.

    Raises:
        ValueError: a module that belongs to the adapter was replaced after LoRA was added.
        CannotWrite: an `OSError`: the disk is full or read-only.
    """
    with as_plain_lora(model, state_dict) as state, writing(Path(directory)):
        model.save_pretrained(str(directory), state_dict=state)
    blocks = {
        name: [n for n, m in model.get_base_model().named_modules() if _is_block(m, name)] for name in model.peft_config
    }
    for name, modules in blocks.items():  # peft puts every adapter but "default" into a folder of its own
        folder = Path(directory) if name == "default" else Path(directory) / name
        active = name in model.active_adapters
        write_json(folder / ABM_FILE, {"format": FORMAT, "qv_only": modules, **(settings if active else {})})


def _is_block(module: nn.Module, adapter_name: str) -> bool:
    return (
        isinstance(module, LoraLayer)
        and adapter_name in module.lora_B
        and isinstance(module.lora_B[adapter_name], BlockLinear)
    )


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    is_trainable: bool = False,
    adapter_name: str = "default",
    merged_linear: bool = True,
    backbone: Backbone | None = None,
) -> PeftModel:
    """Put a saved adapter (ours or stock peft's) on a model, ready to run or to be trained further.

    Unlike `PeftModel.from_pretrained` it makes a fused qkv run that the model would bypass, and keeps the k rows
    of an adapter for q and v alone at zero.

    Args:
        model: a bare model, or a `PeftModel` to which the adapter is added under a new name, inactive.
        directory: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        is_trainable: whether the adapter is to be trained on; frozen otherwise, as in peft.
        adapter_name: as in `add_lora`.
        merged_linear: as in `add_lora`.
        backbone: as in `add_lora`.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the adapter is no LoRA, its files are damaged, they do not fit the model, or the model has an
            adapter of this name already.
    """
    folder, config = Path(directory), _read_config(directory)
    bare = bare_model(model, adapter_name)
    backbone = backbone or find_backbone(bare)
    if isinstance(model, PeftModel) and changes_base(config):
        raise ValueError(
            f"{directory} was saved raw after init {config.init_lora_weights!r}: loading it would change the base "
            "weights under the other adapters. Save it with save_adapter"
        )
    blocks = read_settings(folder)["qv_only"] if (folder / ABM_FILE).is_file() else []
    if merged_linear:
        config._register_custom_module({nn.Linear: merged_linear_factory})
    try:
        if isinstance(model, PeftModel):
            adapted, config.inference_mode = model, not is_trainable
            model.add_adapter(adapter_name, config)
            with modes_given_back(model):
                model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        else:
            adapted = PeftModel.from_pretrained(
                bare, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config
            )
    except (ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(model, PeftModel) and adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        why = " ".join(str(error).split())
        raise ValueError(f"the adapter {directory} does not fit this model, or is damaged: {why}") from error
    names = [n for n, m in bare.named_modules() if isinstance(m, LoraLayer)]
    backbone.prepare(bare, names)
    restrict_to_blocks(adapted, adapter_name, blocks)
    return guard_saved_modules(adapted)


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
    folder, config = Path(directory), _read_config(directory)
    if changes_base(config):
        raise ValueError(
            f"{directory} was saved raw after init {config.init_lora_weights!r}, so it needs changed base weights: "
            "save it with save_adapter"
        )
    config.modules_to_save, config.inference_mode = None, True
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'adapter_model.safetensors'} cannot be read: {error}") from error
    try:
        model.add_adapter(adapter_name, config)
        loaded = set_peft_model_state_dict(
            model, {n: t for n, t in tensors.items() if ".lora_" in n}, adapter_name=adapter_name
        )
        if loaded.unexpected_keys:
            raise ValueError(f"the model lacks {', '.join(loaded.unexpected_keys[:4])}")
    except (ValueError, RuntimeError) as error:
        if adapter_name in model.peft_config:
            model.delete_adapter(adapter_name)
        raise ValueError(f"the reference {directory} does not fit this model: {error}") from error
    bare = model.get_base_model()
    names = [n for n, m in bare.named_modules() if isinstance(m, LoraLayer) and adapter_name in m.lora_A]
    (backbone or find_backbone(bare)).prepare(bare, names)


def _read_config(directory: str | os.PathLike[str]) -> LoraConfig:
    """The configuration of a saved LoRA adapter; raises FileNotFoundError and ValueError."""
    folder = Path(directory)
    path, weights = folder / "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {directory}: pass a folder that save_adapter wrote")
    kind = read_object(path, REMEDY).get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path} has peft_type {kind!r}; only LoRA adapters can be loaded")
    if not any((folder / name).is_file() for name in weights):  # peft would ask a hub for it
        raise FileNotFoundError(f"no {weights[0]} in {directory}: pass a folder that save_adapter wrote")
    config = PeftConfig.from_pretrained(str(directory))
    return config


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
    return settings
