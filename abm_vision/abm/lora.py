"""LoRA on a model's attention and MLP projections, in peft's own layers and files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from abm_vision.abm.backbone import Backbone, find_backbone
from abm_vision.abm.files import write_json
from abm_vision.abm.merged_linear import BlockLinear, merged_linear_factory

KINDS = ("all", "attention", "mlp")
QKV_MODES = ("full", "qv")
ABM_FILE = "abm.json"


def add_lora(
    model: nn.Module,
    rank: int = 8,
    alpha: float = 8,
    *,
    targets: str | Sequence[str] = "all",
    qkv: str = "full",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    modules_to_save: Sequence[str] | None = None,
    adapter_name: str = "default",
    merged_linear: bool = True,
    backbone: Backbone | None = None,
) -> PeftModel:
    """Put LoRA on the attention and MLP projections of every block; the head trains and is saved with it.

    The result is an ordinary `PeftModel` (B = 0: it computes what `model` did) whose files stock peft loads.
    Seed torch on the line above: A is drawn from the global generator.

    Args:
        model: a bare model, or a `PeftModel` to which a further adapter is added under a new `adapter_name`
            (it is added inactive: `model.set_adapter(name)` selects it).
        rank: r of every adapted layer, 1 .. min(in, out).
        alpha: the update is scaled by alpha / r, or alpha / sqrt(r) with `rslora`.
        targets: "all", "attention", "mlp", or names as in peft's `target_modules` ("attn.qkv", "fc1", a full
            module name); names only ever select projections inside blocks, never patch embedding or head.
        qkv: "full" adapts a fused qkv as one layer; "qv" adapts q and v with rank r each and leaves k alone
            (in the file a rank-2r adapter whose B has zero rows for k; they stay zero in training).
        rank_pattern: module name or regular expression, as in peft, to the rank of those layers.
        alpha_pattern: likewise to their alpha.
        dropout: on the input of A, in [0, 1).
        rslora: scale by alpha / sqrt(r) (arXiv:2312.03732).
        dora: weight-decomposed LoRA (arXiv:2402.09353).
        modules_to_save: modules trained in full and saved with the adapter; None means the classifier.
        adapter_name: peft's name of the adapter.
        merged_linear: train on merged weights (`MergedLinear`), equal to peft's layer and faster.
        backbone: the record of the model's family; found from the model if None.

    Raises:
        ValueError: an argument out of its range, a name that selects nothing, a model that has this adapter
            already or was reset after it was adapted, or a model of no known family.
    """
    bare = _bare_model(model, adapter_name)
    backbone = backbone or find_backbone(bare)
    check_choice("qkv", qkv, QKV_MODES)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if dora and qkv == "qv":
        raise ValueError('DoRA rescales every row of the weight, k too: use qkv="full" with dora=True')
    names = _select_targets(bare, backbone, targets)
    blocks = []
    if qkv == "qv":
        names, blocks = _without_keys(bare, backbone, names)
    ranks = {n: _pattern_value(rank_pattern, n, rank) for n in names}
    alphas = {n: _pattern_value(alpha_pattern, n, alpha) for n in names}
    _check_patterns("rank_pattern", rank_pattern, names)
    _check_patterns("alpha_pattern", alpha_pattern, names)
    _check_ranks(bare, ranks)
    for name in blocks:  # two blocks of rank r in one adapter of rank 2r, with the scaling of rank r
        ranks[name] *= 2
        alphas[name] *= math.sqrt(2) if rslora else 2

    backbone.prepare(bare, names)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(names),
        rank_pattern={n: r for n, r in ranks.items() if r != rank},
        alpha_pattern={n: a for n, a in alphas.items() if a != alpha},
        lora_dropout=dropout,
        use_rslora=rslora,
        use_dora=dora,
        modules_to_save=backbone.head_modules(bare) if modules_to_save is None else list(modules_to_save),
    )
    if merged_linear:
        config._register_custom_module({nn.Linear: merged_linear_factory})
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name=adapter_name)
    _restrict_to_blocks(model, adapter_name, blocks)
    return guard_saved_modules(model)


def _bare_model(model: nn.Module, adapter_name: str) -> nn.Module:
    if is_compiled(model):
        raise ValueError(
            "the model is compiled: add the adapter to the model itself, and call torch.compile afterwards"
        )
    if isinstance(model, PeftModel):
        if adapter_name in model.peft_config:
            raise ValueError(
                f"the model already has an adapter named {adapter_name!r}: a second add_lora would train on top of "
                "it. Give another adapter_name, or start from model.unload()."
            )
        return model.get_base_model()
    if any(isinstance(m, LoraLayer) for m in model.modules()):
        raise ValueError(
            "the model contains LoRA layers but is no PeftModel: pass the PeftModel that get_peft_model returned, "
            "or a bare model (model.unload())"
        )
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(model)` made it, or `model.compile()` was called."""
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def _select_targets(model: nn.Module, backbone: Backbone, targets: str | Sequence[str]) -> list[str]:
    found = backbone.find_targets(model)
    everything = [n for n, _ in model.named_modules() if any(n in names for names in found.values())]
    if not all(found.values()) or not any(backbone.find_boundaries(model).values()):
        parts = ", ".join(f"{len(v)} {k} projections" for k, v in found.items())
        raise ValueError(
            f"{type(model).__name__} has no blocks of attention and MLP that this package can adapt (found {parts}). "
            "Pass backbone=Backbone(...) with the names of its projections and activation modules."
        )
    if isinstance(targets, str):
        check_choice("targets", targets, KINDS, hint="or a list of module names")
        return everything if targets == "all" else found[targets]
    selected: set[str] = set()
    for target in targets:
        hits = [n for n in everything if n == target or n.endswith(f".{target}")]
        if not hits:
            leaves = sorted({re.sub(r"^.*\d+\.", "", n) for n in everything})
            raise ValueError(f"target {target!r} matches no projection inside a block; there are: {', '.join(leaves)}")
        selected.update(hits)
    if not selected:
        raise ValueError(f"targets is empty; allowed are {', '.join(KINDS)} or a list of module names")
    return [n for n in everything if n in selected]


def _without_keys(model: nn.Module, backbone: Backbone, names: list[str]) -> tuple[list[str], list[str]]:
    """The targets less the key projections, and those among them that are a fused qkv."""
    fused = set(backbone.fused_qkv(model))
    kept = [n for n in names if not re.fullmatch(backbone.key_modules, n)]
    mixed = [n for n in kept if n not in fused and re.search(r"\.(qkv\w*|kv|qk|in_proj)(\.\w+)*$", n)]
    if mixed:
        raise ValueError(
            f'qkv="qv" needs separate projections or q, k and v one after the other; {mixed[0]} (and '
            f'{len(mixed) - 1} more) mixes keys in otherwise. Use qkv="full".'
        )
    blocks = [n for n in kept if n in fused]
    if len(kept) == len(names) and not blocks:
        raise ValueError('qkv="qv" was asked for, but the targets hold no attention input projection')
    return kept, blocks


def _pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    hits = [value for key, value in (pattern or {}).items() if _matches(key, name)]
    return hits[0] if hits else default


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None  # peft's rule for rank_pattern keys


def _check_patterns(field: str, pattern: Mapping[str, Any] | None, names: list[str]) -> None:
    for key in pattern or {}:
        if not any(_matches(key, n) for n in names):
            raise ValueError(f"{field} key {key!r} matches none of the {len(names)} adapted layers, e.g. {names[0]}")


def _check_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        limit = min(layer.weight.shape[:2])
        if not 1 <= rank <= limit:
            raise ValueError(f"rank {rank} for {name} {tuple(layer.weight.shape)}: allowed are 1 .. {limit}")


def _restrict_to_blocks(model: PeftModel, adapter_name: str, names: Sequence[str]) -> None:
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        layer.lora_B[adapter_name] = BlockLinear.from_linear(layer.lora_B[adapter_name])


def check_choice(field: str, value: object, allowed: Sequence[str], hint: str = "") -> None:
    """Raise a ValueError naming the allowed values unless `value` is one of them."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{field} is {value!r}; allowed are {choices}{', ' + hint if hint else ''}")


# --- what a later change of the model would lose in silence ------------------------------------------------------


def guard_saved_modules(model: PeftModel) -> PeftModel:
    """Make `state_dict()` (and so every save) fail if a module that is saved with the adapter was replaced.

    timm's `reset_classifier()` puts a bare layer where peft's wrapper was; peft then writes no head at all.
    """
    model.register_state_dict_pre_hook(_check_before_saving)
    return model


def _check_before_saving(model: PeftModel, prefix: str, keep_vars: bool) -> None:
    check_saved_modules(model)


def check_saved_modules(model: PeftModel) -> None:
    """Raise a ValueError if a module of `modules_to_save` is no longer peft's wrapper."""
    bare = model.get_base_model()
    for config in model.peft_config.values():
        for suffix in config.modules_to_save or ():
            hits = [m for n, m in bare.named_modules() if n == suffix or n.endswith(f".{suffix}")]
            if not any(isinstance(m, ModulesToSaveWrapper) for m in hits):
                raise ValueError(
                    f"{suffix!r} was replaced after LoRA was added (reset_classifier?): it would neither be saved "
                    "nor loaded. Reset the head first, then call add_lora."
                )


def check_adapters(model: PeftModel, batch: Any, *, backbone: Backbone | None = None) -> None:
    """One forward and backward pass that proves that every adapter of the active set takes part.

    Nothing is left behind: gradients, modes and the random state are as before.

    Args:
        model: the adapted model.
        batch: as the user's loader yields it; it goes through the backbone's `forward_fn`.
        backbone: as in `add_lora`.

    Raises:
        ValueError: adapted layers received no gradient; the message names them. Or a head was replaced.
    """
    backbone = backbone or find_backbone(model)
    check_saved_modules(model)
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    factors = {
        n: [
            p
            for part in (m.lora_A, m.lora_B)
            for k, f in part.items()
            if k in m.active_adapters
            for p in f.parameters()
        ]
        for n, m in layers.items()
    }
    trainable = {n: [p for p in ps if p.requires_grad] for n, ps in factors.items()}
    flat = [p for ps in trainable.values() for p in ps]
    if not flat:
        raise ValueError("no LoRA weight is trainable; load the adapter with is_trainable=True")
    kept = [(p, p.grad) for p in model.parameters()]
    training = [(m, m.training) for m in model.modules()]
    try:
        model.eval()  # stochastic depth would skip blocks, batch norm would count the batch
        for parameter in model.parameters():
            parameter.grad = None
        with torch.random.fork_rng(), torch.enable_grad():
            output = _first_tensor(backbone.forward_fn(model, batch)).float()
            # A plain sum is blind behind a normalisation, so weigh the outputs at random.
            if output.requires_grad:
                (output * torch.randn_like(output)).sum().backward()
        reached = {id(p) for p in flat if p.grad is not None and bool((p.grad != 0).any())}
    finally:
        for parameter, grad in kept:
            parameter.grad = grad
        for module, mode in training:
            module.training = mode
    silent = [n for n, ps in trainable.items() if not any(id(p) in reached for p in ps)]
    if silent:
        raise ValueError(
            f"{len(silent)} of {len(layers)} adapted layers received no gradient: {', '.join(silent)}. The model's "
            "forward pass does not call them (or its head is all zero); leave them out of targets."
        )


def _first_tensor(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return _first_tensor(next(iter(output.values() if isinstance(output, Mapping) else output)))


# --- files -------------------------------------------------------------------------------------------------------


def save_adapter(model: PeftModel, directory: str | os.PathLike[str], **settings: Any) -> None:
    """`model.save_pretrained` (stock peft's files), and beside them `abm.json` with what peft has no word for.

    Args:
        model: the adapted model.
        directory: made if it does not exist.
        settings: JSON values to keep in `abm.json`, such as `report=report.to_dict()`.

    Raises:
        ValueError: a module that belongs to the adapter was replaced after LoRA was added.
    """
    model.save_pretrained(str(directory))
    blocks = {
        name: [n for n, m in model.get_base_model().named_modules() if _is_block(m, name)] for name in model.peft_config
    }
    for name, modules in blocks.items():  # peft puts every adapter but "default" into a folder of its own
        folder = Path(directory) if name == "default" else Path(directory) / name
        write_json(folder / ABM_FILE, {"format": 1, "qv_only": modules, **settings})


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
        adapter_name, merged_linear, backbone: as in `add_lora`.

    Raises:
        FileNotFoundError: the directory holds no adapter.
        ValueError: the adapter is no LoRA, or the model has an adapter of this name already.
    """
    folder = Path(directory)
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in {directory}: pass a folder that save_adapter wrote")
    bare = _bare_model(model, adapter_name)
    backbone = backbone or find_backbone(bare)
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{directory} holds a {config.peft_type.value} adapter; only LoRA adapters can be loaded")
    if merged_linear:
        config._register_custom_module({nn.Linear: merged_linear_factory})
    if isinstance(model, PeftModel):
        config.inference_mode = not is_trainable
        model.add_adapter(adapter_name, config)
        model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable)
        adapted = model
    else:
        adapted = PeftModel.from_pretrained(
            bare, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config
        )
    names = [n for n, m in bare.named_modules() if isinstance(m, LoraLayer)]
    backbone.prepare(bare, names)
    settings = folder / ABM_FILE
    if settings.is_file():
        _restrict_to_blocks(adapted, adapter_name, json.loads(settings.read_text())["qv_only"])
    return guard_saved_modules(adapted)
