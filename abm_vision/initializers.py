"""Every start of a LoRA adapter, peft's and ours: one table, and one verb that applies a row of it."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn

from abm_vision.abm.adapter import Adapter, adapted_layers, changes_base, guard, remember_base_change
from abm_vision.abm.align import AlignReport, initialize_lora_aligned_weights
from abm_vision.abm.arguments import check_type
from abm_vision.abm.batches import (
    batch_size,
    check_finite,
    collect,
    counted,
    explained,
    one_by_one,
    whole_mask,
)
from abm_vision.abm.gradient import LossFn, weight_gradients
from abm_vision.abm.hooks import ForwardFn
from abm_vision.abm.host import Backbone, find_backbone
from abm_vision.abm.lora import settle_modes
from abm_vision.abm.match import initialize_lora_abm_weights
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.report import ABMReport
from abm_vision.abm.restore import evaluate, initialising
from abm_vision.abm.settings import ABMConfig, AlignConfig

NEEDS = ("nothing", "batches", "labelled batches", "batches and a reference")
RANDOM_B_STD = 0.01


@dataclass(frozen=True)
class Ingredients:
    """What a start may use. `batches` is empty for one that needs none.

    Args:
        model: fresh from `add_lora`.
        adapter_name: the adapter to start.
        batches: calibration batches on the model's device.
        backbone: the record of the model's family.
        forward_fn: (model, batch) runs the model.
        loss_fn: (model, batch) to the scalar mean loss.
        reference: the name of another adapter, or another model, for a start that needs one.
        abm, align: settings of the boundary matching and of the alignment.
        progress: show a bar.
    """

    model: PeftModel
    adapter_name: str
    batches: list[Any]
    backbone: Backbone
    forward_fn: ForwardFn
    loss_fn: LossFn
    reference: str | nn.Module | None
    abm: ABMConfig
    align: AlignConfig
    progress: bool


Report = ABMReport | AlignReport | None


@dataclass(frozen=True)
class Initializer:
    """One start.

    Args:
        name: what `init` and `--init` take.
        summary: one line for people.
        source: the paper.
        needs: one of `NEEDS`.
        apply: changes the adapter (and the base weights, where `changes_base`) in place.
        changes_base: takes the start out of the base weights; `save_adapter` writes a plain adapter of twice the
            rank for the untouched base. For all others the file is the adapter itself.
        reads_weights: computes with the base weights, so that they must not be quantised.
        blocks: works on an adapter for q and v alone inside a fused qkv.
        in_factors: A and B hold the whole start. Otherwise ranks, frozen factors or base weights belong to it, and
            whoever restores a checkpoint must apply the start first.
    """

    name: str
    summary: str
    source: str
    needs: str
    apply: Callable[[Ingredients], Report]
    changes_base: bool = False
    reads_weights: bool = False
    blocks: bool = False
    in_factors: bool = True


def initialize_lora(
    model: PeftModel,
    init: str,
    dataloader: Iterable[Any] | None = None,
    *,
    config: ABMConfig | None = None,
    align: AlignConfig | None = None,
    reference: str | nn.Module | None = None,
    loss_fn: LossFn | None = None,
    forward_fn: ForwardFn | None = None,
    adapter_name: str = "default",
    backbone: Backbone | None = None,
    show_progress_bar: bool = True,
) -> Report:
    """Start a fresh adapter with any initialisation of the table, in place, before the optimiser is made.

    Peft's own starts run through peft's own code. Those that change the base weights (PiSSA, OLoRA, CorDA, LoRA-GA)
    leave the model's output where it was, but switching the adapter off no longer gives the pretrained model;
    `save_adapter` writes what loads on the untouched base.

    Args:
        model: fresh from `add_lora`, on its device.
        init: a name of `INITIALIZERS`.
        dataloader: yields calibration batches, for a start that needs them; `config.samples` samples are taken, for
            "abm_aligned" `align.samples`.
        config: settings of boundary matching, number of samples and seed; `ABMConfig()` if None.
        align: settings of the aligned start, `AlignConfig()` if None.
        reference: for "abm_tuned": the name of another adapter of this model, or another model.
        loss_fn: (model, batch) to the scalar mean loss, for a start that needs labels; the backbone's if None.
        forward_fn: (model, batch) runs the model; the backbone's if None.
        adapter_name: the adapter to start; it must be the active one.
        backbone: the record of the model's family; found from the model if None.
        show_progress_bar: a tqdm bar, for a start that takes steps.

    Returns:
        The report of a start of ours that matches boundaries, else None.

    Raises:
        ValueError: an unknown name (the message has the nearest ones), no dataloader, labels or reference for a start
            that needs them, a kind of layer or adapter that the start cannot serve, or an adapter that is not fresh.
    """
    start = get_initializer(init)
    config, align = config or ABMConfig(), align or AlignConfig()
    check_type("config", config, ABMConfig)
    check_type("align", align, AlignConfig)
    adapter = Adapter(model, adapter_name)
    adapter.check_fresh()
    _check_served(adapter, start)
    backbone = backbone or find_backbone(model)
    if start.needs != "nothing" and dataloader is None:
        raise ValueError(f"{init} needs {start.needs}: pass a dataloader")
    if "reference" in start.needs and reference is None:
        raise ValueError(f"{init} needs a reference: the name of an adapter tuned on the task, or a tuned model")
    samples = align.samples if start.apply is _align else config.samples
    with initialising(adapter, config.seed, base=start.changes_base):
        given = Ingredients(
            model=model,
            adapter_name=adapter_name,
            batches=[] if start.needs == "nothing" else collect(dataloader, adapter.device, samples),
            backbone=backbone,
            forward_fn=explained(forward_fn or backbone.forward_fn),
            loss_fn=loss_fn or backbone.loss_fn,
            reference=reference,
            abm=config,
            align=align,
            progress=show_progress_bar,
        )
        report = start.apply(given)
    settle_modes(model, adapter_name)  # peft has made the inner modules anew
    return report


def get_initializer(name: str) -> Initializer:
    """The start of that name.

    Raises:
        ValueError: there is none; the message has the nearest names.
    """
    if not isinstance(name, str) or name not in INITIALIZERS:
        near = difflib.get_close_matches(str(name), INITIALIZERS, n=2)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"init is {name!r}; allowed are {', '.join(INITIALIZERS)}{hint}")
    return INITIALIZERS[name]


def _check_served(adapter: Adapter, start: Initializer) -> None:
    """Raise a ValueError if a kind of layer, adapter or model is not what the initialisation is made for."""
    others = ", ".join(name for name in adapter.model.peft_config if name != adapter.name)
    if others and not start.in_factors:
        raise ValueError(f"{start.name} changes more than its adapter, which {others} would suffer: start it alone")
    if start.reads_weights:
        adapter.check_weights(start.name)
    if start.blocks:
        return
    for name, layer in adapter.layers.items():
        if isinstance(layer.lora_B[adapter.name], BlockLinear):
            raise ValueError(f"{start.name} cannot leave k alone inside the fused {name}: use qkv='full'")
        if not isinstance(layer.get_base_layer(), nn.Linear):
            kind = type(layer.get_base_layer()).__name__
            raise ValueError(f"{start.name} starts nn.Linear layers alone, {name} is a {kind}: leave it out of targets")


# ---------------------------------------------------------------------------------------------- peft's own starts


def _keep(given: Ingredients) -> None:
    """`add_lora` has drawn A as peft does, and B is zero."""


def _peft(value: str) -> Callable[[Ingredients], None]:
    """A start that peft makes from the weights alone."""
    return lambda given: _restart(given, value)


def _restart(given: Ingredients, value: str, **fields: Any) -> None:
    """What `get_peft_model` does to every layer under `init_lora_weights=value`."""
    config = given.model.peft_config[given.adapter_name]
    for name, content in {"init_lora_weights": value, **fields}.items():
        setattr(config, name, content)
    layers = adapted_layers(given.model, given.adapter_name).values()
    with _no_autocast(given.model):  # decompositions and what is taken out of the base weights need full precision
        for layer in layers:
            rank, alpha = layer.r[given.adapter_name], layer.lora_alpha[given.adapter_name]
            layer.update_layer(given.adapter_name, r=rank, lora_alpha=alpha, config=config)
    cast_adapter_dtype(given.model, given.adapter_name)
    if changes_base(config):
        guard(given.model)
        for layer in layers:
            remember_base_change(layer, given.adapter_name)


def _no_autocast(model: PeftModel) -> AbstractContextManager[None]:
    return torch.autocast(next(model.parameters()).device.type, enabled=False)


def _eva(given: Ingredients) -> None:
    config = EvaConfig()
    layers = adapted_layers(given.model, given.adapter_name)
    smallest = min(given.batches, key=batch_size)
    for name, shape in _input_shapes(given, smallest).items():
        mask = given.backbone.input_mask(smallest, name)
        tokens = shape[:-1].numel() if mask is None else int(whole_mask(mask, torch.empty(shape)).sum())
        wanted = round(config.rho * layers[name].r[given.adapter_name])
        if tokens < wanted:  # peft would wait for a larger batch for ever
            raise ValueError(
                f"eva looks for {wanted} directions, {name} sees {tokens} tokens in a batch: give larger batches, or "
                "a lower rank"
            )
    names = {id(layer): name for name, layer in layers.items()}

    def counted_inputs(layer_input: Any, batch: Any, peft_name: str) -> Tensor:
        x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
        name = names[id(given.model.get_submodule(peft_name))]
        check_finite(x, f"the input of {name}")
        return counted(x, given.backbone.input_mask(batch, name)).flatten(0, -2)

    _restart(given, "eva", eva_config=config)
    with _no_autocast(given.model):
        initialize_lora_eva_weights(
            given.model,
            given.batches,
            # peft itself calls eval() alone
            forward_fn=lambda model, batch: given.forward_fn(evaluate(model), batch),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=counted_inputs,
            adapter_name=given.adapter_name,
            show_progress_bar=given.progress,
        )
    cast_adapter_dtype(given.model, given.adapter_name)  # layers whose rank has changed were made anew


@torch.no_grad()
def _input_shapes(given: Ingredients, batch: Any) -> dict[str, torch.Size]:
    """The shape of what goes into every adapted layer, which must be finite."""
    shapes: dict[str, torch.Size] = {}

    def look(name: str, x: Tensor) -> None:
        check_finite(x, f"the input of {name}")
        shapes[name] = x.shape

    with ExitStack() as stack:
        for name, layer in adapted_layers(given.model, given.adapter_name).items():
            handle = layer.register_forward_pre_hook(lambda _, args, name=name: look(name, args[0]))
            stack.callback(handle.remove)
        given.forward_fn(evaluate(given.model), batch)
    return shapes


def _corda(given: Ingredients) -> None:
    samples = [sample for batch in given.batches for sample in one_by_one(batch)]  # its hook takes one at a time
    for name, shape in _input_shapes(given, samples[0]).items():
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(f"corda takes one sample's tokens, (1, tokens, in); {name} sees {tuple(shape)}")

    layers = adapted_layers(given.model, given.adapter_name)

    def run_model() -> None:
        for sample in samples:
            with _padding_zeroed(given.backbone, layers, sample):
                given.forward_fn(given.model, sample)

    ranks = {f"{name}.base_layer": layer.r[given.adapter_name] for name, layer in layers.items()}
    config = LoraConfig(
        target_modules=list(ranks),  # the layers inside peft's wrappers
        rank_pattern=ranks,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )
    with given.model.disable_adapter(), _no_autocast(given.model):
        preprocess_corda(given.model.get_base_model(), config, run_model=run_model)
    _restart(given, "corda", corda_config=config.corda_config)


@contextmanager
def _padding_zeroed(backbone: Backbone, layers: Mapping[str, LoraLayer], sample: Any) -> Iterator[None]:
    """Nothing reads what layers make of padding; with inputs of zero it adds nothing to their covariance either."""

    def zeroed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        check_finite(args[0], f"the input of {name}")
        mask = backbone.input_mask(sample, name)
        return args if mask is None else (args[0] * whole_mask(mask, args[0])[..., None].to(args[0]), *args[1:])

    with ExitStack() as stack:
        for name, layer in layers.items():
            base = layer.get_base_layer()
            stack.callback(base.register_forward_pre_hook(lambda _, args, name=name: zeroed(name, args)).remove)
        yield


def _lora_ga(given: Ingredients) -> None:
    """peft's start on gradients that are formed here: its own preprocessing leaves flags and hooks after an error."""
    layers = adapted_layers(given.model, given.adapter_name)

    def attach(name: str, gradient: Tensor) -> None:
        layers[name].get_base_layer()._peft_loraga_grad = gradient

    weight_gradients(given.model, given.batches, given.loss_fn, attach, given.adapter_name)
    _restart(given, "lora_ga", lora_ga_config=LoraGAConfig())


# ----------------------------------------------------------------------------------------------------------- ours


@torch.no_grad()
def _random_b(given: Ingredients) -> None:
    for layer in adapted_layers(given.model, given.adapter_name).values():
        b = layer.lora_B[given.adapter_name]
        b.weight.normal_(std=RANDOM_B_STD)
        if isinstance(b, BlockLinear):
            b.weight.mul_(b.mask)


def _match_boundaries(given: Ingredients) -> ABMReport:
    return initialize_lora_abm_weights(
        given.model,
        given.batches,
        given.abm,
        reference=given.reference or "pretrained",
        adapter_name=given.adapter_name,
        forward_fn=given.forward_fn,
        backbone=given.backbone,
        show_progress_bar=given.progress,
    )


def _align(given: Ingredients) -> AlignReport:
    return initialize_lora_aligned_weights(
        given.model,
        given.batches,
        given.align,
        loss_fn=given.loss_fn,
        adapter_name=given.adapter_name,
        forward_fn=given.forward_fn,
        backbone=given.backbone,
    )


_BATCHES, _LABELS, _REFERENCE = NEEDS[1:]
_TABLE: Sequence[Initializer] = (
    Initializer(
        "kaiming", "peft's default: A Kaiming-uniform, B zero", "arXiv:2106.09685", "nothing", _keep, blocks=True
    ),
    Initializer("gaussian", "A normal with std 1 / r, B zero", "arXiv:2106.09685", "nothing", _peft("gaussian")),
    Initializer(
        "orthogonal",
        "A and B non-zero with B A = 0; even rank",
        "datta0.github.io/posts/rethink-lora-init",
        "nothing",
        _peft("orthogonal"),
        reads_weights=True,  # for their dtype
    ),
    Initializer(
        "pissa",
        "the weight's leading singular pairs, taken out of it",
        "arXiv:2404.02948",
        "nothing",
        _peft("pissa"),
        changes_base=True,
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "pissa_niter_16",
        "the same with a fast decomposition",
        "arXiv:2404.02948",
        "nothing",
        _peft("pissa_niter_16"),
        changes_base=True,
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "olora",
        "the first r columns of the weight's QR decomposition, taken out of it",
        "arXiv:2406.01775",
        "nothing",
        _peft("olora"),
        changes_base=True,
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "mica",
        "B: the weight's last left singular vectors, frozen; A zero",
        "arXiv:2604.01694",
        "nothing",
        _peft("mica"),
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "eva",
        "A: leading directions of the layer's inputs, ranks shared out by variance",
        "arXiv:2410.07170",
        _BATCHES,
        _eva,
        in_factors=False,
    ),
    Initializer(
        "corda",
        "leading pairs of weight times input covariance, taken out of the weight",
        "arXiv:2406.05223",
        _BATCHES,
        _corda,
        changes_base=True,
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "lora_ga",
        "the gradient's singular vectors, taken out of the weight",
        "arXiv:2407.05000",
        _LABELS,
        _lora_ga,
        changes_base=True,
        reads_weights=True,
        in_factors=False,
    ),
    Initializer(
        "random_b", f"A as peft's, B normal with std {RANDOM_B_STD}", "a control", "nothing", _random_b, blocks=True
    ),
    Initializer(
        "abm",
        "boundaries matched to the pretrained model's",
        "arXiv:2511.19145",
        _BATCHES,
        _match_boundaries,
        blocks=True,
    ),
    Initializer(
        "abm_tuned",
        "boundaries matched to those of an adapter tuned before",
        "arXiv:2511.19145",
        _REFERENCE,
        _match_boundaries,
        blocks=True,
    ),
    Initializer(
        "abm_aligned",
        "the gradient's directions, sized so that boundaries stay",
        "arXiv:2511.19145 and this package",
        _LABELS,
        _align,
        blocks=True,
    ),
)
INITIALIZERS: Mapping[str, Initializer] = {start.name: start for start in _TABLE}
