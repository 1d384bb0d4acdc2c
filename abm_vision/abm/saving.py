"""Saving adapters: stock peft's files, and `abm.json` beside them."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from abm_vision.abm.adapter import Adapter, adapted_layers, check_base, check_some_adapter
from abm_vision.abm.arguments import count
from abm_vision.abm.base_change import base_changes, lora_layers
from abm_vision.abm.files import read_object, write_atomically, write_json, writing
from abm_vision.abm.host import Backbone, known_backbones
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.names import plain_name

ABM_FILE, FORMAT = "abm.json", 1
CARD = "README.md"
CARD_MARK = "<!-- written by save_adapter, which writes it anew -->"
_PACKAGES = ("abm-lora", "torch", "peft", "timm", "transformers")
PEFT_PREFIX = "base_model.model."  # of every tensor in an adapter's file


def save_adapter(
    model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    card: str = "",
    **settings: Any,
) -> None:
    """`model.save_pretrained` (stock peft's files), and beside them `abm.json` and a model card.

    `abm.json` has what peft has no word for. Of a timm model that is its name and tag, size, number of classes, how
    images are made into its input, the licence and the origin of its weights, as far as timm or `create_backbone`
    recorded them, so that `load_adapter(directory)` builds it again.

    An adapter that `initialize_lora` started by changing the base weights (PiSSA and others) is written as a plain
    one of twice the rank, for the untouched base. Compiled parts are saved under the names that they had before.

    Args:
        model: the adapted model.
        directory: made if it does not exist.
        state_dict: what the model cannot give by itself, as in peft: the parameters of a sharded one (FSDP), whole.
        card: Markdown for the model card, on data, results and limits; text with a head (`---`) is the whole card. A
            README.md that was there and that this function has not written stays.
        settings: JSON values to keep in the active adapter's `abm.json`, such as `report=report.to_dict()` and
            `init="abm"`. Of a timm model `classes`, the names of its classes in the order of its outputs, and
            `preprocessing`, where images are not made into its input as timm records it: image_size, interpolation,
            mean, std, crop_pct (of the shorter side), crop_mode ("center", or "squash" to a square).

    Raises:
        ValueError: the model has no LoRA adapter, or one that a loader would not find: a module that belongs to it was
            replaced or wrapped, or its values are not there (meta device) or not finite.
        CannotWrite: an `OSError`: the disk is full or read-only.

    Warns:
        UserWarning: timm's name and size do not give this model (other arguments, a layer replaced, base weights that
            changed since `create_backbone`), so that `load_adapter(directory)` will ask for it; or parameters are
            trained that no adapter holds.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PeftModel):
        raise ValueError(f"{type(model).__name__} is no PeftModel: pass what add_lora or load_adapter returned")
    check_some_adapter(model)
    try:
        json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the settings {', '.join(settings)} cannot be written as JSON: {error}") from None
    bare = model.get_base_model()
    backbone = next((one for one in known_backbones() if one.matches(bare)), None)
    embeds = "auto" if hasattr(bare, "get_input_embeddings") else False  # "auto" asks the hub for the base model
    kept = _foreign_card(Path(directory) / CARD)
    with _uncompiled(model), as_plain_lora(model, state_dict) as state:
        facts = backbone.describe(bare, settings) if backbone else settings
        for name in model.peft_config:
            check_base(model, "an adapter beside it is of no use on the unchanged base", but=name)
            _check_loadable(Adapter(model, name), state)
        _warn_of_the_rest(model, state)
        with writing(Path(directory)):
            model.save_pretrained(str(directory), state_dict=state, save_embedding_layers=embeds)
        blocks = {
            name: [n for n, layer in adapted_layers(model, name).items() if _is_block(layer, n, name, state)]
            for name in model.peft_config
        }
    for name, modules in blocks.items():  # peft puts every adapter but "default" into a folder of its own
        folder = Path(directory) if name == "default" else Path(directory) / name
        active = name in model.active_adapters
        about = {"host": backbone.name if backbone else None, "versions": _versions()}
        own = facts if active else backbone.describe(bare, {}) if backbone else {}
        write_json(folder / ABM_FILE, {"format": FORMAT, "qv_only": modules, **about, **own})
        if own.get("hub"):
            _name_base(folder / "adapter_config.json", own["hub"])
        if active and not kept and (text := _card(backbone, own, model, card)):
            write_atomically(folder / CARD, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))


def push_to_hub(model: PeftModel, repo_id: str, *, private: bool | None = None, **saved: Any) -> CommitInfo:
    """Save an adapter into a repository on the Hugging Face hub, which is made if it does not exist.

    Unlike `model.push_to_hub`, which uploads peft's own files, this uploads all that `save_adapter` writes.
    `load_adapter(huggingface_hub.snapshot_download(repo_id))` reads it. The token is the one that
    `huggingface_hub.login` has kept, or HF_TOKEN.

    Args:
        model: the adapted model.
        repo_id: "user/name".
        private: whether a new repository is private; None takes the account's default.
        saved: as for `save_adapter`: classes, preprocessing, card, ...

    Raises:
        ValueError: as `save_adapter`.
        HfHubHTTPError: an `OSError`: the hub refuses it.
    """
    with TemporaryDirectory() as folder:
        save_adapter(model, folder, **saved)
        api = HfApi()
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an adapter")


def _versions() -> dict[str, str]:
    return {found.name: found.version for found in map(_installed, _PACKAGES) if found}


def _installed(package: str) -> metadata.Distribution | None:
    return next(iter(metadata.distributions(name=package)), None)


def _name_base(path: Path, hub: str) -> None:
    """Put the base model's name on the hub where peft has none: peft, given it earlier, would ask the hub for it."""
    content = read_object(path, "save the adapter again")
    write_json(path, {**content, "base_model_name_or_path": content["base_model_name_or_path"] or hub})


def _foreign_card(path: Path) -> bool:
    """Whether somebody else has written the model card that lies in the folder."""
    return path.is_file() and CARD_MARK not in path.read_text(encoding="utf-8")


def _card(backbone: Backbone | None, facts: Mapping[str, Any], model: PeftModel, text: str) -> str:
    if text.startswith("---"):
        return f"{text.rstrip()}\n\n{CARD_MARK}\n"
    return f"{backbone.card(facts, model, text).rstrip()}\n\n{CARD_MARK}\n" if backbone and backbone.card else ""


def _is_block(layer: LoraLayer, name: str, adapter_name: str, state: Mapping[str, Tensor]) -> bool:
    """Whether a saved B is for q and v alone: peft's hotswap may have put a whole one into the layer."""
    b = layer.lora_B[adapter_name]
    if not isinstance(b, BlockLinear):
        return False
    saved = state[f"{PEFT_PREFIX}{name}.lora_B.{adapter_name}.weight"]
    return not saved.masked_fill(b.mask.to(saved.device), 0).any()


@contextmanager
def _uncompiled(model: PeftModel) -> Iterator[None]:
    """Take off the wrappers of `torch.compile`, which are in the names of modules and tensors."""
    compiled = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and "_orig_mod" in child._modules
    ]
    for parent, name, child in compiled:
        parent._modules[name] = child._orig_mod
    try:
        yield
    finally:
        for parent, name, child in compiled:
            parent._modules[name] = child


def _warn_of_the_rest(model: PeftModel, state: dict[str, Tensor]) -> None:
    """Say which trained parameters belong to no adapter: norms that were thawed beside it, say."""
    saved = {
        key
        for name in model.peft_config
        for key in get_peft_model_state_dict(model, state, name, save_embedding_layers=False)
    }
    rest = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _OF_ADAPTERS.search(name) and plain_name(name) not in saved
    ]
    if rest:
        warnings.warn(
            f"the adapter's file does not hold {count(len(rest), 'trained parameter')} beside it ({rest[0]}"
            f"{' and others' if len(rest) > 1 else ''}): save them yourself, or train the adapter and the head alone",
            stacklevel=3,
        )


_OF_ADAPTERS = re.compile(r"\.(?:lora_\w+|modules_to_save|trainable_tokens\w*|token_adapter)\.")


def _check_loadable(adapter: Adapter, state: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless whoever loads the adapter's tensors finds all of it."""
    for name, layer in adapter.layers.items():
        rank, alpha = layer.r[adapter.name], layer.lora_alpha[adapter.name]
        scaling = alpha / (math.sqrt(rank) if layer.use_rslora[adapter.name] else rank)
        if not math.isclose(float(layer.scaling[adapter.name]), scaling, rel_tol=1e-6):
            raise ValueError(
                f"the scaling of {name} is {float(layer.scaling[adapter.name]):g}, and a loader would find "
                f"{scaling:g}: set it back (unscale_layer), or multiply B by it, before saving"
            )
        by_parameter = adapter.config.target_parameters or not adapter.config.target_modules
        if not by_parameter and not check_target_module_exists(adapter.config, name):
            raise ValueError(
                f"{name} is not among the target modules of adapter {adapter.name!r}: something was wrapped around the "
                "model's modules after LoRA was added (DataParallel?); take it off before saving"
            )
    for name in state:
        if _OF_ADAPTERS.search(name) and re.search(r"\.parametrizations\.|_orig$", name):
            raise ValueError(
                f"{name} is a part of a parametrised or pruned tensor, which a loader would not find: call "
                "torch.nn.utils.parametrize.remove_parametrizations, or prune.remove, before saving"
            )
    for name, tensor in state.items():
        if ".lora_" not in name or not re.search(rf"\.{re.escape(adapter.name)}(\.|$)", name):
            continue
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is on the meta device and has no values: load the adapter first")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} is NaN or infinite, the training diverged: there is nothing to save")


# ----------------------------------------------------------- initialisations that were taken out of the base weights


@contextmanager
def as_plain_lora(model: PeftModel, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:
    """The state that `model.save_pretrained(..., state_dict=...)` is to write; the configurations fit it meanwhile.

    PiSSA, OLoRA, CorDA and LoRA-GA begin with B0 A0 non-zero and subtract s B0 A0 from the base weight. The trained
    layer computes (W0 - s B0 A0) + s B A = W0 + s [B | -B0] [A ; A0]: a plain adapter of twice the rank. peft's
    `path_initial_model_for_weight_conversion` uses the same identity, but leaves out the head (peft 0.21) and needs
    A0 and B0 in a folder; here they are kept with the model (`base_changes`). All other adapters are as they are.
    `state_dict` takes the place of the model's own.
    """
    state = {plain_name(k): v for k, v in (_state(model) if state_dict is None else state_dict).items()}
    configs = dict(model.peft_config)
    for name, layer in lora_layers(model):
        for adapter, (start_a, start_b) in base_changes(layer).items():
            if adapter in configs and adapter in layer.lora_A:
                a, b = (f"{name}.lora_{factor}.{adapter}.weight" for factor in "AB")
                state[a] = torch.cat([state[a], start_a.to(state[a])], 0)
                state[b] = torch.cat([state[b], -start_b.to(state[b])], 1)
                model.peft_config[adapter] = _twice_the_rank(configs[adapter])
    try:
        yield state
    finally:
        model.peft_config.update(configs)


def _state(model: PeftModel) -> Mapping[str, Tensor]:
    """The model's state dict; of an offloaded one with the values that lie elsewhere."""
    if not any(hasattr(module, "_hf_hook") for module in model.modules()):
        return model.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


def _twice_the_rank(config: LoraConfig) -> LoraConfig:
    """The same scaling at rank 2r: alpha / r, or alpha / sqrt(r) with rsLoRA."""
    factor = math.sqrt(2) if config.use_rslora else 2

    def times(values: dict[str, Any], by: float) -> dict[str, Any]:
        return {key: value * by for key, value in values.items()}

    plain = copy.copy(config)
    plain.init_lora_weights, plain.corda_config, plain.lora_ga_config = True, None, None
    plain.r, plain.rank_pattern = 2 * config.r, times(config.rank_pattern, 2)
    plain.lora_alpha, plain.alpha_pattern = factor * config.lora_alpha, times(config.alpha_pattern, factor)
    return plain
