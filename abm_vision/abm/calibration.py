"""What the reference says about the calibration batches: signs as bits, computed once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from abm_vision.abm.adapter import Adapter
from abm_vision.abm.batches import batch_size, can_be_cut, check_finite, cut
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn, preactivations
from abm_vision.abm.host import Backbone
from abm_vision.abm.loss import boundary_figures, counted, layer_weight, pack_signs, unpack_signs
from abm_vision.abm.restore import evaluate, restored
from abm_vision.abm.settings import ABMConfig


@dataclass(frozen=True)
class Layer:
    """A matched boundary: its module, its stack, w_l^2, and the margin m in units of z."""

    name: str
    stack: str
    weight: float
    margin: float


@dataclass(frozen=True)
class Part:
    """Calibration samples and the reference's signs on them, eight to a byte."""

    batch: Any
    packed: dict[str, tuple[Tensor, torch.Size]]
    masks: dict[str, Tensor | None]

    def sign(self, name: str) -> Tensor:
        """The reference's signs at one boundary: boolean, (batch, ..., hidden)."""
        return unpack_signs(*self.packed[name])

    def mask(self, layer: Layer) -> Tensor | None:
        """The tokens of the layer's stack that count: boolean, (batch, tokens), or None for all."""
        return self.masks[layer.stack]

    def split(self, size: int) -> list[Part]:
        """Parts of about equal size, of at most `size` samples.

        Where a model folds something else into its batch dimension (TNT its patches), or a batch holds what nobody
        can cut (an object of one's own), the part stays whole.
        """
        count = batch_size(self.batch)
        folded = any(shape[0] != count for _, shape in self.packed.values())
        if count <= size or folded or not can_be_cut(self.batch):
            return [self]
        cuts = torch.arange(count).tensor_split(-(-count // size))
        return [self._cut(int(c[0]), int(c[-1]) + 1, count) for c in cuts]

    def _cut(self, start: int, stop: int, count: int) -> Part:
        packed = {n: (b[start:stop], torch.Size((stop - start, *s[1:]))) for n, (b, s) in self.packed.items()}
        masks = {stack: cut(mask, start, stop, count) for stack, mask in self.masks.items()}
        return Part(cut(self.batch, start, stop, count), packed, masks)


@dataclass(frozen=True)
class Calibration:
    """Everything that the matching needs of the reference.

    Args:
        layers: in the order in which they fire.
        parts: the batches with their signs.
        samples: their number.
        before: (layers, 3) state of the adapted model before matching, where it is the reference itself; else None.
    """

    layers: list[Layer]
    parts: list[Part]
    samples: int
    before: Tensor | None

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]


def choose_layers(model: nn.Module, backbone: Backbone, config: ABMConfig) -> dict[str, tuple[str, float]]:
    """The boundaries to match: module name to (stack, w_l^2).

    Raises:
        ValueError: `config.layers` asks for more layers than a stack has, or for a name that is no boundary.
    """
    stacks = {stack: names for stack, names in backbone.find_boundaries(model).items() if names}
    if isinstance(config.layers, int):
        for stack, names in stacks.items():
            if len(names) < config.layers:
                raise ValueError(f"layers is {config.layers}, but stack {stack!r} has only {len(names)} boundaries")
        stacks = {stack: names[-config.layers :] for stack, names in stacks.items()}
    elif not isinstance(config.layers, str):
        known = [n for names in stacks.values() for n in names]
        unknown = [n for n in config.layers if n not in known]
        if unknown or not config.layers:
            given = ", ".join(unknown) or "an empty list"
            raise ValueError(f"layers names {given}; the boundaries of this model are {', '.join(known)}")
        stacks = {stack: [n for n in names if n in config.layers] for stack, names in stacks.items()}
    return {
        name: (stack, layer_weight(depth, len(names), config.layer_weights))
        for stack, names in stacks.items()
        for depth, name in enumerate(names)
    }


@torch.no_grad()
def calibrate(
    adapter: Adapter,
    batches: list[Any],
    chosen: dict[str, tuple[str, float]],
    config: ABMConfig,
    reference: str | nn.Module,
    forward_fn: ForwardFn,
    token_mask_fn: TokenMaskFn,
) -> Calibration:
    """Run the reference once over every batch, and forget all but the signs.

    Raises:
        ValueError: the reference lacks a boundary, a batch cannot be run, a boundary never fires, or an activation is
            not finite.
    """
    if isinstance(reference, nn.Module):
        bare = reference.get_base_model() if hasattr(reference, "get_base_model") else reference
        there = {name for name, _ in bare.named_modules()}
        absent = [name for name in chosen if name not in there]
        if absent:
            raise ValueError(f"the reference {type(reference).__name__} has no modules {', '.join(absent)}")
    idle = reference == "pretrained" and adapter.does_nothing
    layers: list[Layer] = []
    parts: list[Part] = []
    states: list[Tensor] = []
    for batch in batches:
        with _as_reference(adapter, reference) as teacher:
            recorded = preactivations(teacher, batch, list(chosen), forward_fn)
        _check_recorded(recorded, "reference")
        masks = {stack: token_mask_fn(batch, stack) for stack in {stack for stack, _ in chosen.values()}}
        if not layers:
            layers = [
                Layer(name, *chosen[name], _margin(z, masks[chosen[name][0]], config)) for name, z in recorded.items()
            ]
        parts.append(Part(batch, {n: (pack_signs(z > 0), z.shape) for n, z in recorded.items()}, masks))
        if idle:
            states.append(layer_states(layers, recorded, parts[-1]))
    samples = [batch_size(b) for b in batches]
    return Calibration(layers, parts, sum(samples), _average(states, samples) if idle else None)


def _margin(z: Tensor, mask: Tensor | None, config: ABMConfig) -> float:
    """m in units of z; a relative one is scaled by the first batch's root mean square."""
    if config.margin_unit == "absolute":
        return config.margin
    return config.margin * counted(z, mask).float().square().mean().sqrt().item()


@contextmanager
def _as_reference(adapter: Adapter, reference: str | nn.Module) -> Iterator[nn.Module]:
    if isinstance(reference, nn.Module):
        with restored(reference):
            yield evaluate(reference)
    elif reference == "pretrained":
        with adapter.model.disable_adapter():
            yield adapter.model
    else:
        with restored(adapter.model):
            adapter.model.set_adapter(reference)
            yield adapter.model


@torch.no_grad()
def measure(model: PeftModel, calibration: Calibration, forward_fn: ForwardFn) -> Tensor:
    """(layers, 3): loss, match rate and share inside the margin of the adapted model, over all batches; on CPU.

    Raises:
        ValueError: an activation is not finite.
    """
    states = []
    for part in calibration.parts:
        recorded = preactivations(model, part.batch, calibration.names, forward_fn)
        _check_recorded(recorded, "adapted model")
        states.append(layer_states(calibration.layers, recorded, part))
    return _average(states, [batch_size(part.batch) for part in calibration.parts])


def _check_recorded(recorded: dict[str, Tensor], whose: str) -> None:
    for name, z in recorded.items():
        check_finite(z, f"the {whose}'s pre-activation at {name}")


def layer_states(layers: list[Layer], recorded: dict[str, Tensor], part: Part) -> Tensor:
    """(layers, 3): boundary loss, match rate, share inside the margin on one batch."""
    figures = [
        boundary_figures(recorded[layer.name], part.sign(layer.name), layer.margin, part.mask(layer))
        for layer in layers
    ]
    return torch.stack([figure.to(figures[0].device) for figure in figures])  # of a model spread over devices


def _average(states: list[Tensor], samples: list[int]) -> Tensor:
    weights = torch.tensor(samples, dtype=torch.float64) / sum(samples)
    return torch.einsum("b,blk->lk", weights, torch.stack(states).cpu().double()).float()
