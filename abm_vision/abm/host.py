"""All that differs between host models, gathered in one record each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from torch import Tensor, nn

_NOTHING = r"(?!)"  # a pattern that matches no name


@dataclass(frozen=True)
class Backbone:
    r"""What the core needs to know of a family of models. Names are matched whole (`re.fullmatch`).

    Most families need the first six fields. A network of one's own, whose blocks call `mix` and then `mlp`:

    >>> class Block(nn.Module):
    ...     def __init__(self) -> None:
    ...         super().__init__()
    ...         self.mix, self.up, self.act, self.down = nn.Linear(8, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)
    ...
    ...     def forward(self, x: Tensor) -> Tensor:
    ...         return x + self.down(self.act(self.up(self.mix(x))))
    >>> mine = Backbone(
    ...     name="my mixer",
    ...     matches=lambda model: isinstance(model, nn.Sequential) and isinstance(model[0], Block),
    ...     target_modules={"attention": r"\d+\.mix", "mlp": r"\d+\.(?:up|down)"},
    ...     boundary_modules={"blocks": r"\d+\.act"},
    ...     forward_fn=lambda model, batch: model(batch[0]),
    ...     loss_fn=lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]),
    ... )
    >>> mine.find_targets(nn.Sequential(Block(), Block()))
    {'attention': ['0.mix', '1.mix'], 'mlp': ['0.up', '0.down', '1.up', '1.down']}

    Pass it as `backbone=mine`, or `register_backbone(mine)` once.

    Args:
        name: for messages.
        matches: whether a (bare) model belongs to the family.
        target_modules: where LoRA sits: kind of projection ("attention", "mlp") to a pattern of module names.
        boundary_modules: where signs are compared: stack to a pattern of *activation* modules, whose input is the
            pre-activation. A stack is a sequence of blocks with a depth of its own (T5 has two).
        forward_fn: runs the model on one batch as the user's loader yields it.
        loss_fn: (model, batch) to the scalar mean loss of a labelled batch; raises a ValueError without labels.
        token_mask_fn: (batch, stack) to a boolean (batch, tokens) mask of the tokens that count, or None for all.
        input_stack: the name of an adapted layer to the stack whose tokens it reads; not needed with one stack.
        key_modules: pattern of the attention projections that give keys alone, if there are any.
        fused_qkv: the names of the linear layers whose output is q, k and v one after the other.
        head_modules: the names of the classifier's modules, trained and saved with the adapter.
        prepare: called with the names of the adapted modules before LoRA is added; puts right what would keep
            an adapter from running, and raises what it cannot put right.
        describe: (model, what `save_adapter` was given) to what `abm.json` says of the model; raises a ValueError.
            `hub` in it is the base model's name on the hub.
        card: (what `abm.json` says, the model, Markdown on data and results) to the adapter's model card; None leaves
            peft's.
        task_type: the model to peft's name of what it is for ("CAUSAL_LM"), which the Auto classes of peft need in an
            adapter's file; None where it has none.
        build: (an adapter's folder, weights or None) to the model that it is for; None where that is not known.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    target_modules: Mapping[str, str]
    boundary_modules: Mapping[str, str]
    forward_fn: Callable[[nn.Module, Any], Any]
    loss_fn: Callable[[nn.Module, Any], Tensor]
    token_mask_fn: Callable[[Any, str], Tensor | None] = lambda batch, stack: None
    input_stack: Callable[[str], str] | None = None
    key_modules: str = _NOTHING
    fused_qkv: Callable[[nn.Module], list[str]] = lambda model: []
    head_modules: Callable[[nn.Module], list[str]] = lambda model: []
    prepare: Callable[[nn.Module, list[str]], None] = lambda model, adapted: None
    describe: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] = lambda model, given: dict(given)
    card: Callable[[Mapping[str, Any], nn.Module, str], str] | None = None
    task_type: Callable[[nn.Module], str | None] = lambda model: None
    build: Callable[[Path, str | None], nn.Module] | None = None

    def input_mask(self, batch: Any, name: str) -> Tensor | None:
        """The tokens that count of what goes into an adapted layer: boolean (batch, tokens), or None for all."""
        stack = next(iter(self.boundary_modules)) if self.input_stack is None else self.input_stack(name)
        return self.token_mask_fn(batch, stack)

    def find_targets(self, model: nn.Module) -> dict[str, list[str]]:
        """Kind of projection to the names of its linear layers, in the model's order."""
        return {
            kind: [n for n, m in model.named_modules() if re.fullmatch(pattern, n) and is_projection(m)]
            for kind, pattern in self.target_modules.items()
        }

    def find_boundaries(self, model: nn.Module) -> dict[str, list[str]]:
        """Stack to the names of its activation modules, in the model's order: the index is the depth."""
        return {
            stack: [n for n, _ in model.named_modules() if re.fullmatch(pattern, n)]
            for stack, pattern in self.boundary_modules.items()
        }


def is_projection(module: nn.Module) -> bool:
    """A linear map of the channels: `nn.Linear`, a 1x1 convolution, or peft's wrapper of one."""
    base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
    if isinstance(base, nn.Conv2d):
        return base.kernel_size == (1, 1) and base.groups == 1
    return isinstance(base, nn.Linear)


# The records that come with this package; each is loaded when a model is looked up.
_SHIPPED = ("nlp_ext.t5:T5", "nlp_ext.llama:LLAMA", "abm_vision.vit:VIT")
_registered: list[Backbone] = []


def register_backbone(backbone: Backbone) -> None:
    """Make a family known to `find_backbone`; later records are asked first, the shipped ones last.

    Raises:
        ValueError: it is no `Backbone`.
    """
    if not isinstance(backbone, Backbone):
        raise ValueError(f"the backbone is {backbone!r}; it must be a Backbone: its docstring has a worked example")
    _registered.insert(0, backbone)


def known_backbones() -> list[Backbone]:
    """All records, in the order in which they are asked."""
    return [*_registered, *map(resolve_name, _SHIPPED)]


def find_backbone(model: nn.Module) -> Backbone:
    """The record of the family that a model (bare or adapted by peft) belongs to.

    Raises:
        ValueError: the model is of no known family.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbones = known_backbones()
    for backbone in backbones:
        if backbone.matches(bare):
            return backbone
    raise ValueError(
        f"{type(bare).__module__}.{type(bare).__name__} is no supported model (those are: "
        f"{', '.join(b.name for b in backbones)}). "
        "Pass backbone=Backbone(...) with the module names of its attention and MLP projections and of its "
        "activation modules."
    )
