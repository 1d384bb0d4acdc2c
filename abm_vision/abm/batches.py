"""Calibration batches of any structure: taken from a loader, moved, counted, cut, and run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset, IterableDataset

T = TypeVar("T")


class BadBatch(ValueError):
    """What is wrong with a batch, or with what a model makes of it."""


def collect(dataloader: Iterable[Any], device: torch.device, samples: int | None = None) -> list[Any]:
    """Whole batches on `device` until there are `samples` samples, or the loader ends.

    Raises:
        ValueError: a dataset was given in place of a loader, the loader yields nothing, or a batch holds no tensor, no
            sample, or a NaN.
    """
    if isinstance(dataloader, Dataset) and not isinstance(dataloader, IterableDataset):
        raise ValueError(
            f"{type(dataloader).__name__} is a dataset, whose samples are no batches: pass "
            "torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    if not isinstance(dataloader, Iterable):
        raise ValueError(f"the dataloader is {dataloader!r}; it must yield batches: a DataLoader, or a list of them")
    batches, seen = [], 0
    for batch in dataloader:
        which = f"batch {len(batches) + 1} of the loader"
        if batch_size(batch) == 0:
            raise BadBatch(f"{which} ({described(batch)}) holds no sample: leave it out")
        _check_numbers(batch, which)  # before it is moved: an accelerator would be waited for
        batches.append(to_device(batch, device))
        seen += batch_size(batches[-1])
        if samples is not None and seen >= samples:
            break
    if not batches:
        raise ValueError("the dataloader is empty: at least one batch of samples is needed")
    return batches


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of any structure with its tensors on `device`; mappings (transformers' BatchEncoding) as dictionaries."""
    return tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, _as_tree(batch))


def _as_tree(batch: Any) -> Any:
    """Mappings of other kinds, at any depth, as dictionaries, into which torch looks."""
    return tree_map(
        lambda v: {key: _as_tree(value) for key, value in v.items()} if isinstance(v, Mapping) else v,
        dict(batch) if isinstance(batch, Mapping) else batch,
    )


def batch_size(batch: Any) -> int:
    """The first dimension of the first tensor in a batch of any structure."""
    for leaf in _tensors(batch):
        if leaf.ndim:
            return len(leaf)
    raise BadBatch(f"a batch of type {type(batch).__name__} holds no tensor; expected tensors, tuples or mappings")


def cut(batch: Any, start: int, stop: int, count: int) -> Any:
    """Samples start .. stop - 1 of a batch of `count`; what has no entry a sample stays whole."""
    return tree_map(
        lambda v: v[start:stop] if isinstance(v, (Tensor, np.ndarray)) and v.ndim and len(v) == count else v, batch
    )


def within(batches: Iterable[Any], samples: int, tokens: int, length: Callable[[Any], int]) -> list[Any]:
    """The first batches, the last one cut, with at most so many samples and tokens together; one sample at least.

    Args:
        batches: as `collect` gives them.
        samples: the budget of samples.
        tokens: the budget of tokens.
        length: a batch to the tokens of each sample, padding included; 0 where they are not counted.
    """
    kept: list[Any] = []
    for batch in batches:
        count, each = batch_size(batch), length(batch)
        fit = min(samples, tokens // each if each else samples)
        if kept and fit < 1:
            break
        if fit < count and can_be_cut(batch):
            return [*kept, cut(batch, 0, max(fit, 1), count)]
        kept.append(batch)
        samples, tokens = samples - count, tokens - count * each
    return kept


def can_be_cut(batch: Any) -> bool:
    """Whether all of a batch is looked into: something of another kind might hold samples, too."""
    known = (Tensor, np.ndarray, str, bytes, bool, int, float, type(None))
    return all(isinstance(leaf, known) for leaf in tree_leaves(batch))


def one_by_one(batch: Any) -> Iterator[Any]:
    """Its samples as batches of one."""
    count = batch_size(batch)
    return (cut(batch, k, k + 1, count) for k in range(count))


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """The values (batch, tokens, ...) of the tokens that count: (counted, ...); all of them without a mask."""
    return values if mask is None else values[whole_mask(mask, values)]


def whole_mask(mask: Tensor, values: Tensor) -> Tensor:
    """A mask for all tokens of `values` (batch, tokens, ...), on their device.

    A mask of fewer tokens is of the last ones: class and register tokens stand before the patches, and count.

    Raises:
        ValueError: it is of other samples, or of more tokens.
    """
    before = values.shape[1] - mask.shape[1] if mask.ndim == 2 and values.ndim > 2 else -1
    if before < 0 or len(mask) != len(values):
        raise ValueError(
            f"a token mask {tuple(mask.shape)} does not fit values {tuple(values.shape)}: it must be (batch, tokens). "
            "Where the batch's attention mask is another one, pass token_mask_fn"
        )
    if not mask.any():
        raise ValueError("the token mask leaves no token of a batch: leave the batch out")
    return F.pad(mask.to(values.device).bool(), (before, 0), value=True)


def described(batch: Any) -> str:
    """Type, dtypes and shapes, for messages."""
    shapes = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in _tensors(batch))
    return f"{type(batch).__name__} with {shapes or 'no tensors'}"


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(_as_tree(batch)) if isinstance(leaf, Tensor)]


def _check_numbers(batch: Any, which: str) -> None:
    """NaN is never right, and neither is infinity; minus infinity is what some attention masks hold."""
    for tensor in _tensors(batch):
        if tensor.is_floating_point() and (tensor.isnan() | tensor.isposinf()).any():
            raise BadBatch(f"{which} ({described(batch)}) holds NaN or infinity: check the data and its transforms")


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise a `BadBatch` if what a model computes is not finite."""
    if tensor.numel() and not all(extreme.isfinite() for extreme in torch.aminmax(tensor)):  # NaN is passed on
        raise BadBatch(
            f"{what} is NaN or infinite: check the model's weights and the batches, or initialise without autocast or "
            "in float32"
        )


# What a model raises over a batch that it cannot take.
_MISFITS = (TypeError, AttributeError, LookupError, RuntimeError, ValueError, AssertionError)


def explained(function: Callable[[nn.Module, Any], T]) -> Callable[[nn.Module, Any], T]:
    """(model, batch) run as before; what it raises over the batch becomes one `BadBatch` that describes it.

    Out of memory is no fault of the batch's, and is passed on.
    """

    @wraps(function)
    def run(model: nn.Module, batch: Any) -> T:
        try:
            return function(model, batch)
        except BadBatch:
            raise
        except _MISFITS as error:
            if out_of_memory(error):
                raise
            raise BadBatch(
                f"the model cannot take a batch ({described(batch)}): {type(error).__name__}: {error}. Samples come "
                "first in every tensor; for another kind of batch pass forward_fn=lambda model, batch: ... (or loss_fn)"
            ) from error

    return run


def out_of_memory(error: BaseException) -> bool:
    """torch has a type of its own for an accelerator's memory alone."""
    return isinstance(error, MemoryError) or any(w in str(error) for w in ("out of memory", "can't allocate memory"))
