"""peft's own initialisations, by peft's own code. Torch is imported where it is used: the table is read without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from abm_vision.initializers.record import Ingredients, Initializer, Needs, Properties
from abm_vision.initializers.registry import BASELINE, register_initializer

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import Tensor

    from abm_vision.abm.host import Backbone

TAKEN_OUT = Properties.CHANGES_BASE | Properties.READS_WEIGHTS | Properties.BEYOND_FACTORS


# ------------------------------------------------------------------------------------------- from the weights alone


def keep(given: Ingredients) -> None:
    """Change nothing: `add_lora` has drawn A as peft does, and B is zero."""


register_initializer(
    Initializer(
        BASELINE,
        "peft's default: A Kaiming-uniform, B zero",
        "arXiv:2106.09685",
        Needs.NOTHING,
        keep,
        Properties.BLOCKS,
    )
)


def _peft(value: str) -> Callable[[Ingredients], None]:
    """What peft makes from the weights alone."""
    return lambda given: _restart(given, value)


def _restart(given: Ingredients, value: str, **fields: Any) -> None:
    """What `get_peft_model` does to every layer under `init_lora_weights=value`."""
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from abm_vision.abm.adapter import guard
    from abm_vision.abm.base_change import changes_base, remember_base_change

    config = given.model.peft_config[given.adapter_name]
    for name, content in {"init_lora_weights": value, **fields}.items():
        setattr(config, name, content)
    layers = given.layers.values()
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
    import torch

    return torch.autocast(next(model.parameters()).device.type, enabled=False)


_FROM_WEIGHTS: Mapping[str, tuple[str, str, Properties]] = {
    "gaussian": ("A normal with std 1 / r, B zero", "arXiv:2106.09685", Properties.NONE),
    "orthogonal": (
        "A and B non-zero with B A = 0; even rank",
        "datta0.github.io/posts/rethink-lora-init",
        Properties.READS_WEIGHTS,  # for their dtype
    ),
    "pissa": ("the weight's leading singular pairs, taken out of it", "arXiv:2404.02948", TAKEN_OUT),
    "pissa_niter_16": ("the same with a fast decomposition", "arXiv:2404.02948", TAKEN_OUT),
    "olora": (
        "the first r columns of the weight's QR decomposition, taken out of it",
        "arXiv:2406.01775",
        TAKEN_OUT,
    ),
    "mica": (
        "B: the weight's last left singular vectors, frozen; A zero",
        "arXiv:2604.01694",
        Properties.READS_WEIGHTS | Properties.BEYOND_FACTORS,
    ),
}
for _name, (_summary, _source, _properties) in _FROM_WEIGHTS.items():
    register_initializer(Initializer(_name, _summary, _source, Needs.NOTHING, _peft(_name), _properties))


# ------------------------------------------------------------------------------------------------- from the inputs


def eva(given: Ingredients) -> None:
    """Give A the leading directions of the layer's inputs, and layers the ranks that their variance asks for.

    peft decomposes the inputs batch by batch until the directions settle. These are the same in the limit, and exact:
    the leading eigenvectors of the inputs' covariance, of one pass over the batches. Ranks are shared out by its rule.
    """
    from peft import EvaConfig, initialize_lora_eva_weights
    from peft.tuners.tuners_utils import cast_adapter_dtype

    from abm_vision.abm.batches import check_finite, counted
    from abm_vision.abm.moments import input_moments
    from abm_vision.abm.restore import evaluate

    config, layers, name_of = EvaConfig(), given.layers, given.adapter_name
    ranks = {name: layer.r[name_of] for name, layer in layers.items()}

    def inputs_of(name: str, batch: Any, x: Tensor) -> Tensor:
        check_finite(x, f"the input of {name}")
        return counted(x, given.backbone.input_mask(batch, name)).flatten(0, -2)

    directions: dict[str, Tensor] = {}
    shares: dict[str, Tensor] = {}
    with _no_autocast(given.model):
        found = input_moments(layers, given.batches, lambda b: given.forward_fn(evaluate(given.model), b), inputs_of)
        for names, moments in found:
            wanted = round(config.rho * max(ranks[name] for name in names))
            if moments.count <= wanted:
                raise ValueError(
                    f"eva looks for {wanted} directions, {names[0]} sees {moments.count} tokens: give more samples, or "
                    "a lower rank"
                )
            leading = moments.principal(min(wanted, len(moments.centre)))
            for name in names:
                directions[name], shares[name] = leading
    ranks = _shared_out({name: shares[name] for name in layers}, sum(ranks.values()))
    modules = {id(module): name for name, module in given.model.named_modules()}
    state = {modules[id(layer)]: directions[name][: ranks[name]] for name, layer in layers.items()}
    _restart(given, "eva", eva_config=config)
    initialize_lora_eva_weights(given.model, eva_state_dict=state, adapter_name=name_of)
    cast_adapter_dtype(given.model, name_of)  # layers whose rank has changed were made anew


def _shared_out(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks of layers: directions are taken by their share of their own layer's variance, the largest first."""
    import torch

    owners = [name for name, of_layer in shares.items() for _ in of_layer]
    order = torch.cat(list(shares.values())).argsort(descending=True, stable=True)[:budget]
    taken = [owners[k] for k in order.tolist()]
    return {name: taken.count(name) for name in shares}


def _input_shapes(given: Ingredients, batch: Any) -> dict[str, torch.Size]:
    """The shape of what goes into every adapted layer, which must be finite."""
    import torch

    from abm_vision.abm.batches import check_finite
    from abm_vision.abm.hooks import hooked
    from abm_vision.abm.restore import evaluate

    shapes: dict[str, torch.Size] = {}

    def look(name: str, args: tuple[Any, ...]) -> None:
        check_finite(args[0], f"the input of {name}")
        shapes[name] = args[0].shape

    with torch.no_grad(), hooked(given.layers, before=look):
        given.forward_fn(evaluate(given.model), batch)
    return shapes


register_initializer(
    Initializer(
        "eva",
        "A: leading directions of the layer's inputs, ranks shared out by variance",
        "arXiv:2410.07170",
        Needs.BATCHES,
        eva,
        Properties.BEYOND_FACTORS,
    )
)


def corda(given: Ingredients) -> None:
    """Take the leading pairs of weight times input covariance out of the weight."""
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    from abm_vision.abm.batches import one_by_one

    samples = [sample for batch in given.batches for sample in one_by_one(batch)]  # its hook takes one at a time
    for name, shape in _input_shapes(given, samples[0]).items():
        if len(shape) != 3 or shape[0] != 1:
            raise ValueError(f"corda takes one sample's tokens, (1, tokens, in); {name} sees {tuple(shape)}")

    layers = given.layers

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


def _padding_zeroed(backbone: Backbone, layers: Mapping[str, LoraLayer], sample: Any) -> AbstractContextManager[None]:
    """Nothing reads what layers make of padding; with inputs of zero it adds nothing to their covariance either."""
    from abm_vision.abm.batches import check_finite, whole_mask
    from abm_vision.abm.hooks import hooked

    def zeroed(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        check_finite(args[0], f"the input of {name}")
        mask = backbone.input_mask(sample, name)
        return args if mask is None else (args[0] * whole_mask(mask, args[0])[..., None].to(args[0]), *args[1:])

    return hooked({name: layer.get_base_layer() for name, layer in layers.items()}, before=zeroed)


register_initializer(
    Initializer(
        "corda",
        "leading pairs of weight times input covariance, taken out of the weight",
        "arXiv:2406.05223",
        Needs.BATCHES,
        corda,
        TAKEN_OUT,
    )
)


# ----------------------------------------------------------------------------------------------- from the gradient


def lora_ga(given: Ingredients) -> None:
    """Apply peft's LoRA-GA to gradients that are formed here: its own preprocessing leaves hooks after an error."""
    from peft.tuners.lora.config import LoraGAConfig

    from abm_vision.abm.gradient import weight_gradients

    layers = given.layers

    def attach(name: str, gradient: Tensor) -> None:
        layers[name].get_base_layer()._peft_loraga_grad = gradient

    with _repeatable_attention(next(given.model.parameters()).device):
        weight_gradients(given.model, given.batches, given.loss_fn, attach, given.adapter_name)
    _restart(given, "lora_ga", lora_ga_config=LoraGAConfig())


def _repeatable_attention(device: torch.device) -> AbstractContextManager[Any]:
    """On CUDA, attention by plain products: fused kernels add up gradients in no fixed order.

    A run that is resumed repeats the initialisation, since its base weights are no part of a checkpoint.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


register_initializer(
    Initializer(
        "lora_ga",
        "the gradient's singular vectors, taken out of the weight",
        "arXiv:2407.05000",
        Needs.LABELS,
        lora_ga,
        TAKEN_OUT,
    )
)
