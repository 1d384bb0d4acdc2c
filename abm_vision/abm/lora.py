"""LoRA on a model's attention and MLP projections, in peft's own layers and files."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn

from abm_vision.abm.adapter import absence, adapted_layers, check_room, guard
from abm_vision.abm.arguments import KINDS, QKV_MODES, check_choice, check_real, check_whole
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.merged_linear import BlockLinear, merged_linear_factory
from abm_vision.abm.names import layer_kind


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
    bare = check_room(model, adapter_name)
    backbone = backbone or find_backbone(bare)
    check_choice("qkv", qkv, QKV_MODES)
    check_whole("rank", rank, 1)
    check_real("alpha", alpha, 0, above=True)
    rank, alpha = _plain_number(rank), _plain_number(alpha)
    check_real("dropout", dropout, 0)
    if dropout >= 1:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1)")
    if dora and qkv == "qv":
        raise ValueError('DoRA rescales every row of the weight, k too: use qkv="full" with dora=True')
    names = _select_targets(bare, backbone, targets)
    blocks = []
    if qkv == "qv":
        names, blocks = _without_keys(bare, backbone, names)
    _check_patterns("rank_pattern", rank_pattern, names, lambda name, value: check_whole(name, value, 1))
    _check_patterns("alpha_pattern", alpha_pattern, names, lambda name, value: check_real(name, value, 0, above=True))
    ranks = {n: _pattern_value(rank_pattern, n, rank) for n in names}
    alphas = {n: _pattern_value(alpha_pattern, n, alpha) for n in names}
    _check_ranks(bare, ranks)
    saved = backbone.head_modules(bare) if modules_to_save is None else _saved_modules(bare, modules_to_save, names)
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
        modules_to_save=saved,
    )
    if merged_linear:
        config._register_custom_module({nn.Linear: merged_linear_factory})
    on_meta = absence(bare) == "meta"  # then the adapter is made there, too
    with taken_off_on_error(model, bare, adapter_name, "the adapter"):
        if isinstance(model, PeftModel):
            model.add_adapter(adapter_name, config, low_cpu_mem_usage=on_meta)
        else:
            model = get_peft_model(model, config, adapter_name=adapter_name, low_cpu_mem_usage=on_meta)
        # Only now: a file needs it, while peft would wrap the model in a class of its own.
        model.peft_config[adapter_name].task_type = backbone.task_type(bare)
        settle_modes(model, adapter_name)
        restrict_to_blocks(model, adapter_name, blocks)
    return guard(model)


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
    if not isinstance(targets, Iterable) or not all(isinstance(target, str) for target in targets):
        raise ValueError(f"targets is {targets!r}; it must be one of {', '.join(KINDS)}, or a list of module names")
    selected: set[str] = set()
    for target in targets:
        hits = [n for n in everything if n == target or n.endswith(f".{target}")]
        if not hits:
            leaves = sorted(set(map(layer_kind, everything)))
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
    return _plain_number(hits[0]) if hits else default


def _plain_number(value: Any) -> Any:
    """Python's own number for NumPy's, which cannot be written as JSON."""
    return value.item() if hasattr(value, "item") else value


def _matches(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None  # peft's rule for rank_pattern keys


def _check_patterns(
    field: str, pattern: Mapping[str, Any] | None, names: list[str], check: Callable[[str, Any], None]
) -> None:
    if pattern is not None and not isinstance(pattern, Mapping):
        raise ValueError(f"{field} is {pattern!r}; it must map module names or regular expressions to values")
    for key, value in (pattern or {}).items():
        try:
            hits = [n for n in names if _matches(key, n)]
        except (re.error, TypeError) as error:
            raise ValueError(f"{field} key {key!r} is no module name or regular expression: {error}") from None
        if not hits:
            raise ValueError(f"{field} key {key!r} matches none of the {len(names)} adapted layers, e.g. {names[0]}")
        check(f"{field}[{key!r}]", value)


def _saved_modules(model: nn.Module, wanted: Sequence[str], names: list[str]) -> list[str]:
    """The modules to be trained in full, each of which must be there (peft passes over what is not)."""
    names_alone = isinstance(wanted, Iterable) and not isinstance(wanted, str)
    if not names_alone or not all(isinstance(name, str) and name for name in wanted):
        raise ValueError(f"modules_to_save is {wanted!r}; it must be a list of module names, such as ['head']")
    modules = [name for name, _ in model.named_modules() if name]
    for name in wanted:
        hits = [m for m in modules if m == name or m.endswith(f".{name}")]
        if not hits:
            parameter = any(n == name or n.endswith(f".{name}") for n, _ in model.named_parameters())
            near = difflib.get_close_matches(name, {m.rpartition(".")[2] for m in modules}, n=3)
            what = "a parameter, and only whole modules can be saved" if parameter else "which is no module"
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise ValueError(f"modules_to_save names {name!r}, {what}{hint}")
        if any(isinstance(model.get_submodule(hit), (nn.ModuleList, nn.ModuleDict)) for hit in hits):
            raise ValueError(f"modules_to_save names {name!r}, a list of modules, which nobody calls: name its members")
        adapted = next((n for n in names for hit in hits if n == hit or n.startswith(f"{hit}.")), None)
        if adapted:
            raise ValueError(f"modules_to_save names {name!r}, which holds the adapted layer {adapted}: choose one")
    return list(wanted)


def _check_ranks(model: nn.Module, ranks: Mapping[str, int]) -> None:
    for name, rank in ranks.items():
        layer = model.get_submodule(name)
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        # The weight of a quantised layer has a shape of its own.
        shape = layer.weight.shape[:2] if isinstance(layer, nn.Conv2d) else (layer.out_features, layer.in_features)
        if not 1 <= rank <= min(shape):
            raise ValueError(f"rank {rank} for {name} {tuple(shape)}: allowed are 1 .. {min(shape)}")


@contextmanager
def taken_off_on_error(model: nn.Module, bare: nn.Module, adapter_name: str, what: str) -> Iterator[None]:
    """What is raised while an adapter is put on becomes one message, and the model is as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in bare.parameters()]
    try:
        yield
    except BaseException as error:
        if isinstance(model, PeftModel):
            if adapter_name in model.peft_config:
                model.delete_adapter(adapter_name)
        else:
            for name, module in list(bare.named_modules()):
                if isinstance(module, LoraLayer):
                    bare.set_submodule(name, module.get_base_layer())
                elif isinstance(module, ModulesToSaveWrapper):
                    bare.set_submodule(name, module.original_module)
            vars(bare).pop("peft_config", None)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        if not isinstance(error, UNFIT):
            raise
        why = " ".join(str(error).split())
        raise ValueError(f"{what} does not fit this model, or is damaged: {why}") from error


# What peft and torch raise over an adapter that does not fit a model.
UNFIT = (ValueError, RuntimeError, TypeError, AttributeError, LookupError, SafetensorError, re.error)


def settle_modes(model: PeftModel, adapter_name: str) -> None:
    """Training or evaluation mode of what peft has made, which is always in training mode: that of what it is around.

    LoRA dropout would stay on in an evaluated model.
    """
    bare = model.get_base_model()
    model.training = model.base_model.training = bare.training
    for layer in adapted_layers(model, adapter_name).values():
        layer.train(layer.get_base_layer().training)
    for wrapper in (m for m in bare.modules() if isinstance(m, ModulesToSaveWrapper)):
        wrapper.training = wrapper.modules_to_save.training = wrapper.original_module.training


def restrict_to_blocks(model: PeftModel, adapter_name: str, names: Sequence[str]) -> None:
    """Keep the k rows of the named layers' B at zero."""
    for name in names:
        layer = model.get_base_model().get_submodule(name)
        layer.lora_B[adapter_name] = BlockLinear.from_linear(layer.lora_B[adapter_name])
