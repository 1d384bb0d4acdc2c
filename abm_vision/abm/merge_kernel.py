"""W0 + s B A in one pass over W0: the merge of `MergedLinear` on CUDA, by a Triton kernel.

Triton comes with torch there. Where it cannot build a kernel, torch's own products do the same with more launches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from subprocess import SubprocessError

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

RANKS = 64  # at most: beyond, a product of its own is as fast
ROWS, COLUMNS = 64, 128  # of W that one program merges
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Merge = Callable[[Tensor, Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor, Tensor]]


def merge_kernel(weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> Merge | None:
    """What merges these tensors in one launch (see `merge`), or None."""
    tensors = (weight, lora_a, lora_b)
    fits = len(lora_a) <= RANKS and dtype in DTYPES and all(t.dtype in DTYPES and t.is_contiguous() for t in tensors)
    return merge if fits and _is_built(weight.get_device()) else None


@cache
def _is_built(device: int) -> bool:
    """Whether Triton has a kernel for a device: it takes a compiler of C, and capability 8.0."""
    if triton is None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    tiny = torch.zeros(16, 16, device=f"cuda:{device}")
    try:
        merge(tiny, tiny, tiny, 1.0, torch.float32)
    except (OSError, RuntimeError, SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton builds no kernel here ({reason}): adapters are merged with more launches", stacklevel=2)
        return False
    return True


def merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """W0 + s B A, summed in float32, s A and s B: all of `dtype`, contiguous, on the device of W0.

    Args:
        weight: W0 (out, in), contiguous as the factors, of one of `DTYPES`.
        lora_a: A (r, in), r at most `RANKS`.
        lora_b: B (out, r).
        scaling: s.
        dtype: one of `DTYPES`.
    """
    merged, scaled_a, scaled_b = (torch.empty_like(t, dtype=dtype) for t in (weight, lora_a, lora_b))
    out_features, in_features = weight.shape
    grid = (triton.cdiv(out_features, ROWS), triton.cdiv(in_features, COLUMNS))
    arguments = (weight, lora_a, lora_b, merged, scaled_a, scaled_b, scaling, out_features, in_features, len(lora_a))
    sizes = {"R": max(16, triton.next_power_of_2(len(lora_a))), "ROWS": ROWS, "COLUMNS": COLUMNS}
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _merge[grid](*arguments, **sizes)
    return merged, scaled_a, scaled_b


if triton is not None:

    @triton.jit
    def _merge(
        weight, a, b, merged, scaled_a, scaled_b, scaling, out_features, in_features, rank,
        R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One tile of W (ROWS, COLUMNS); those at its left and upper edge write s B and s A, too."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        ranks = tl.arange(0, R)
        at_a = ranks[:, None] * in_features + columns[None, :]
        at_b = rows[:, None] * rank + ranks[None, :]
        at_w = rows[:, None].to(tl.int64) * in_features + columns[None, :]
        in_a = (ranks[:, None] < rank) & (columns[None, :] < in_features)
        in_b = (rows[:, None] < out_features) & (ranks[None, :] < rank)
        in_w = (rows[:, None] < out_features) & (columns[None, :] < in_features)
        a_tile = tl.load(a + at_a, mask=in_a, other=0.0).to(tl.float32)
        b_tile = scaling * tl.load(b + at_b, mask=in_b, other=0.0).to(tl.float32)
        w_tile = tl.load(weight + at_w, mask=in_w, other=0.0).to(tl.float32)
        w_tile += tl.dot(b_tile, a_tile, input_precision="ieee")
        tl.store(merged + at_w, w_tile.to(merged.dtype.element_ty), mask=in_w)
        if tl.program_id(0) == 0:
            tl.store(scaled_a + at_a, (scaling * a_tile).to(scaled_a.dtype.element_ty), mask=in_a)
        if tl.program_id(1) == 0:
            tl.store(scaled_b + at_b, b_tile.to(scaled_b.dtype.element_ty), mask=in_b)
