"""Whose signs: the reference runs once over the calibration batches, and only its signs are kept.

The reference is this model with its adapters switched off ("pretrained"), another of its adapters, or another model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from abm_vision.abm.adapter import Adapter, check_base
from abm_vision.abm.batches import batch_size, can_be_cut, check_finite, counted, cut, to_device
from abm_vision.abm.boundary import Boundary, Signs, boundary_figures
from abm_vision.abm.hooks import ForwardFn, TokenMaskFn, preactivations
from abm_vision.abm.restore import evaluate, restored
from abm_vision.abm.settings import ABMConfig

Reference: TypeAlias = str | nn.Module


@dataclass(frozen=True)
class Part:
    """Calibration samples, the reference's signs on them, and the tokens that count by stack."""

    batch: Any
    signs: Signs
    masks: dict[str, Tensor | None]

    def split(self, size: int) -> list[Part]:
        """Cut into parts of about equal size, of at most `size` samples.

        Where a model folds something else into its batch dimension, or a batch holds what cannot be cut (an object of
        one's own), the part stays whole.
        """
        count = batch_size(self.batch)
        if count <= size or not self.signs.are_of(count) or not can_be_cut(self.batch):
            return [self]
        cuts = torch.arange(count, device="cpu").tensor_split(-(-count // size))
        return [self._cut(int(c[0]), int(c[-1]) + 1, count) for c in cuts]

    def _cut(self, start: int, stop: int, count: int) -> Part:
        masks = {stack: cut(mask, start, stop, count) for stack, mask in self.masks.items()}
        return Part(cut(self.batch, start, stop, count), self.signs.cut(start, stop), masks)


register_pytree_node(
    Part, lambda part: ([part.batch, part.signs, part.masks], None), lambda children, _: Part(*children)
)


@dataclass(frozen=True)
class Calibration:
    """Everything that a matching needs of the reference.

    Args:
        boundaries: in the order in which they fire.
        parts: the batches with their signs.
        samples: their number.
        before: (layers, 3) figures of the adapted model before matching, where it is the reference itself; else None.
        forward_fn: (model, batch) runs a model.
    """

    boundaries: list[Boundary]
    parts: list[Part]
    samples: int
    before: Tensor | None
    forward_fn: ForwardFn

    def preactivations(self, model: nn.Module, part: Part) -> dict[str, Tensor]:
        """Run a model as far as the last boundary: name to z, (batch, ..., hidden)."""
        return preactivations(model, part.batch, [b.name for b in self.boundaries], self.forward_fn)

    def loss(self, figures: Tensor) -> Tensor:
        """Eq. (22) of a table that `measure` gave: the weighted mean of the layers' losses."""
        return (figures[:, 0] * torch.tensor([b.weight for b in self.boundaries], device=figures.device)).mean()

    @torch.no_grad()
    def measure(self, model: nn.Module) -> Tensor:
        """Measure a model over all samples: (layers, 3) loss, match rate, share inside the margin; on CPU.

        Raises:
            ValueError: an activation is not finite.
        """
        figures = []
        for part in self.parts:
            z = self.preactivations(model, part)
            _check_recorded(z, "adapted model")
            figures.append(boundary_figures(self.boundaries, z, part.signs, part.masks))
        return _average(figures, [batch_size(part.batch) for part in self.parts])


Masked = tuple[Any, dict[str, Tensor | None]]  # a batch, and its mask of tokens that count by stack


def masked(batches: list[Any], chosen: dict[str, tuple[str, float]], token_mask_fn: TokenMaskFn) -> list[Masked]:
    """Every batch with its masks, of the stacks that have a boundary."""
    stacks = {stack for stack, _ in chosen.values()}
    return [(batch, {stack: token_mask_fn(batch, stack) for stack in stacks}) for batch in batches]


@torch.no_grad()
def calibrate(
    adapter: Adapter,
    batches: list[Masked],
    chosen: dict[str, tuple[str, float]],
    config: ABMConfig,
    reference: Reference,
    forward_fn: ForwardFn,
) -> Calibration:
    """Run the reference once over every batch, and forget all but the signs.

    Args:
        adapter: the one to match; with the "pretrained" reference and B = 0 its figures before come for nothing.
        batches: on the model's device, as `masked` gives them.
        chosen: boundary to (stack, w_l^2), as `choose_boundaries` gives it.
        config: margin and its unit.
        reference: "pretrained", the name of another adapter, or another model.
        forward_fn: (model, batch) runs a model.

    Raises:
        ValueError: the reference lacks a boundary, a batch cannot be run, a boundary never fires, or an activation is
            not finite.
    """
    _check_modules(reference, chosen)
    own = reference.parameters() if isinstance(reference, nn.Module) else []
    there = next((parameter.device for parameter in own if not parameter.is_meta), adapter.device)
    here = there == adapter.device
    is_reference = reference == "pretrained" and adapter.does_nothing
    boundaries: list[Boundary] = []
    parts: list[Part] = []
    figures: list[Tensor] = []
    for batch, masks in batches:
        with _as_reference(adapter, reference) as running:
            z = preactivations(running, batch if here else to_device(batch, there), list(chosen), forward_fn)
        z = z if here else to_device(z, adapter.device)
        _check_recorded(z, "reference")
        if not boundaries:
            boundaries = [Boundary(n, *chosen[n], _margin(z[n], masks[chosen[n][0]], config)) for n in z]
        parts.append(Part(batch, Signs.of(z), masks))
        if is_reference:
            figures.append(boundary_figures(boundaries, z, parts[-1].signs, masks))
    samples = [batch_size(part.batch) for part in parts]
    before = _average(figures, samples) if is_reference else None
    return Calibration(boundaries, parts, sum(samples), before, forward_fn)


def check_reference(adapter: Adapter, reference: Reference) -> None:
    """Raise a ValueError unless the signs can come from there."""
    if isinstance(reference, nn.Module):
        return
    if reference == "pretrained":
        check_base(adapter.model, "Pass reference=<an unchanged copy of the model>")
        return
    others = [name for name in adapter.model.peft_config if name != adapter.name]
    if reference not in others:
        raise ValueError(f"reference {reference!r} is neither 'pretrained' nor one of the other adapters {others}")


def reference_name(reference: Reference) -> str:
    """Name a reference in a report: "pretrained", "adapter 'NAME'" or "another CLASS"."""
    if isinstance(reference, nn.Module):
        return f"another {type(reference).__name__}"
    return reference if reference == "pretrained" else f"adapter {reference!r}"


def _check_modules(reference: Reference, chosen: dict[str, tuple[str, float]]) -> None:
    if isinstance(reference, nn.Module):
        bare = reference.get_base_model() if hasattr(reference, "get_base_model") else reference
        there = {name for name, _ in bare.named_modules()}
        if absent := [name for name in chosen if name not in there]:
            raise ValueError(f"the reference {type(reference).__name__} has no modules {', '.join(absent)}")


@contextmanager
def _as_reference(adapter: Adapter, reference: Reference) -> Iterator[nn.Module]:
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


def _margin(z: Tensor, mask: Tensor | None, config: ABMConfig) -> float:
    """m in units of z; a relative one is scaled by the first batch's root mean square."""
    if config.margin_unit == "absolute":
        return config.margin
    return config.margin * counted(z, mask).float().square().mean().sqrt().item()


def _check_recorded(z: dict[str, Tensor], whose: str) -> None:
    # Asked of all at once: on CUDA every answer waits for the device.
    largest = [value.detach().abs().amax().float() for value in z.values() if value.numel()]
    if largest and not torch.stack([one.to(largest[0].device) for one in largest]).isfinite().all():
        for name, value in z.items():
            check_finite(value, f"the {whose}'s pre-activation at {name}")


def _average(figures: list[Tensor], samples: list[int]) -> Tensor:
    weights = torch.tensor(samples, dtype=torch.float64, device="cpu") / sum(samples)
    return torch.einsum("b,blk->lk", weights, torch.stack(figures).cpu().double()).float()
