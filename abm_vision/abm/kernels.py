"""Two operations of `MergedLinear` in half precision on CUDA, by Triton kernels: merging, and the gradients of A and B.

They read W0 once, x and g twice. A layer needs four launches, in the place of the one that casts a frozen model's W0.
Triton comes with torch on CUDA; where it builds no kernel, torch's products do the same.
Sums are in float32, in an order that is always the same.
"""

from __future__ import annotations

import warnings
from functools import cache
from subprocess import SubprocessError

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.errors import TritonError
except ImportError:
    triton = None

RANKS = 64  # at most: a program holds a tile's sums over all ranks in registers
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
# Rows and columns of the tile that one program works on, and its warps.
MERGE = {"ROWS": 32, "COLUMNS": 128, "num_warps": 4}
THIN = {"ROWS": 128, "COLUMNS": 128, "num_warps": 8, "num_stages": 3}
OUTER = {"ROWS": 64, "COLUMNS": 64, "num_warps": 4, "num_stages": 3}
SEGMENT = 1024  # tokens that a program of the outer products adds up


def kernels_fit(weight: Tensor, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are kernels for a layer with these tensors whose products are in `dtype`."""
    if not (weight.is_cuda and dtype in HALF and len(lora_a) <= RANKS and triton is not None):
        return False
    if not all(t.dtype in DTYPES and t.is_contiguous() for t in (weight, lora_a, lora_b)):
        return False
    if torch.compiler.is_compiling():  # or exporting, without dynamo: these operations are not known elsewhere
        return torch.compiler.is_dynamo_compiling() and _is_capable(weight.get_device())
    return _is_built(weight.get_device())


@torch.compiler.assume_constant_result
def _is_capable(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _is_built(device: int) -> bool:
    """Whether Triton builds kernels for a device: it takes capability 8.0 and a C compiler."""
    if not _is_capable(device):
        return False
    tiny = torch.zeros(16, 16, device=f"cuda:{device}")
    try:
        merged, a, b = merge(tiny, tiny, tiny, 1.0, torch.bfloat16)
        factor_gradients(merged, a, merged, b, 1.0)
    except (OSError, RuntimeError, SubprocessError, TritonError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton builds no kernels here ({reason}): adapters train with more launches", stacklevel=2)
        return False
    return True


def merge(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """W0 + s B A, summed in float32, A and B, all of `dtype`.

    Args:
        weight: W0 (out, in), contiguous as the factors, of one of `DTYPES`, on a CUDA device.
        lora_a: A (r, in), r at most `RANKS`.
        lora_b: B (out, r).
        scaling: s.
        dtype: half precision.
    """
    merged, cast_a, cast_b = (torch.empty_like(t, dtype=dtype) for t in (weight, lora_a, lora_b))
    out, in_ = weight.shape
    grid = (triton.cdiv(out, MERGE["ROWS"]), triton.cdiv(in_, MERGE["COLUMNS"]))
    with torch.cuda.device_of(weight):  # Triton launches on the current device
        _merge[grid](weight, lora_a, lora_b, merged, cast_a, cast_b, scaling, out, in_, RANK=len(lora_a), **MERGE)
    return merged, cast_a, cast_b


def factor_gradients(x: Tensor, lora_a: Tensor, grad: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """dA = s (g B)^T x and dB = s g^T (x A^T), one after the other: float32 (r in + out r).

    Args:
        x: (tokens, in), half precision as all of them, with columns side by side.
        lora_a: A (r, in), contiguous.
        grad: g (tokens, out), with columns side by side.
        lora_b: B (out, r), contiguous.
        scaling: s, which multiplies in float32: in float16 a small factor would be rounded away.
    """
    (tokens, in_), out, rank = x.shape, grad.shape[1], len(lora_a)
    segments, padded = triton.cdiv(tokens, SEGMENT), max(16, triton.next_power_of_2(rank))
    u, v = x.new_empty(2, tokens, padded)  # x A^T and g B, with columns of zeros
    partial = x.new_empty(segments, rank * (in_ + out), dtype=torch.float32)
    sizes = (tokens, in_, out, x.stride(0), grad.stride(0))
    ranks = {"RANK": rank, "PADDED": padded}
    tiles = triton.cdiv(in_, OUTER["COLUMNS"]) + triton.cdiv(out, OUTER["COLUMNS"])
    with torch.cuda.device_of(x):
        _thin[(triton.cdiv(tokens, THIN["ROWS"]), 2)](x, lora_a, u, grad, lora_b, v, *sizes, **ranks, **THIN)
        _outer[(tiles, segments)](x, v, grad, u, partial, *sizes, SEGMENT, scaling, **ranks, **OUTER)
    return partial.sum(0)


# The same for torch's compiler, which sees no more of them than what they return.

merge_op = torch.library.custom_op("abm_lora::merge", merge, mutates_args=(), device_types="cuda")
factor_gradients_op = torch.library.custom_op(
    "abm_lora::factor_gradients", factor_gradients, mutates_args=(), device_types="cuda"
)


@merge_op.register_fake
def _(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(t, dtype=dtype) for t in (weight, lora_a, lora_b))


@factor_gradients_op.register_fake
def _(x: Tensor, lora_a: Tensor, grad: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return x.new_empty(len(lora_a) * (x.shape[1] + grad.shape[1]), dtype=torch.float32)


if triton is not None:

    @triton.jit
    def _merge(
        weight, a, b, merged, cast_a, cast_b, scaling, out_features, in_features,
        RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One tile of W; programs at its upper and left edge write A and B in the other precision, too."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_rows, in_columns = rows < out_features, columns < in_features
        at = rows[:, None].to(tl.int64) * in_features + columns[None, :]
        inside = in_rows[:, None] & in_columns[None, :]
        total = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
        for k in range(RANK):
            one_a = tl.load(a + k * in_features + columns, mask=in_columns, other=0.0).to(tl.float32)
            one_b = tl.load(b + rows * RANK + k, mask=in_rows, other=0.0).to(tl.float32)
            total += (scaling * one_b)[:, None] * one_a[None, :]
            if tl.program_id(0) == 0:
                tl.store(cast_a + k * in_features + columns, one_a.to(cast_a.dtype.element_ty), mask=in_columns)
            if tl.program_id(1) == 0:
                tl.store(cast_b + rows * RANK + k, one_b.to(cast_b.dtype.element_ty), mask=in_rows)
        tl.store(merged + at, total.to(merged.dtype.element_ty), mask=inside)

    @triton.jit
    def _thin(
        x, a, u, g, b, v, tokens, in_features, out_features, stride_x, stride_g,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """u = x A^T or v = g B for a tile of tokens."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        if tl.program_id(1) == 0:
            _times(g, b, v, rows, tokens, out_features, stride_g, 1, RANK, RANK, PADDED, ROWS, COLUMNS)
        else:
            _times(x, a, u, rows, tokens, in_features, stride_x, in_features, 1, RANK, PADDED, ROWS, COLUMNS)

    @triton.jit
    def _times(
        wide, factor, thin, rows, tokens, columns, stride, rank_step, column_step,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        ranks = tl.arange(0, PADDED)
        total = tl.zeros((ROWS, PADDED), tl.float32)
        start = wide + rows[:, None].to(tl.int64) * stride
        for first in range(0, columns, COLUMNS):
            at = first + tl.arange(0, COLUMNS)
            tile = tl.load(start + at[None, :], mask=(rows[:, None] < tokens) & (at[None, :] < columns), other=0.0)
            inside = (ranks[None, :] < RANK) & (at[:, None] < columns)
            of_factor = factor + ranks[None, :] * rank_step + at[:, None] * column_step
            total += tl.dot(tile, tl.load(of_factor, mask=inside, other=0.0))
        at = rows[:, None].to(tl.int64) * PADDED + ranks[None, :]
        tl.store(thin + at, total.to(thin.dtype.element_ty), mask=rows[:, None] < tokens)

    @triton.jit
    def _outer(
        x, v, g, u, partial, tokens, in_features, out_features, stride_x, stride_g, segment, scaling,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """dA = s v^T x or dB = s g^T u for a tile of columns, summed over a segment of tokens."""
        first = tl.program_id(1) * segment
        last = tl.minimum(first + segment, tokens)
        of_a = partial + tl.program_id(1) * RANK * (in_features + out_features)
        of_b = of_a + RANK * in_features
        tiles = tl.cdiv(in_features, COLUMNS)
        tile = tl.program_id(0)
        if tile < tiles:
            at = tile * COLUMNS + tl.arange(0, COLUMNS)
            _sum(
                x, v, of_a, at, first, last, in_features, stride_x, in_features, 1, scaling, RANK, PADDED, ROWS, COLUMNS
            )
        else:
            at = (tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)
            _sum(g, u, of_b, at, first, last, out_features, stride_g, 1, RANK, scaling, RANK, PADDED, ROWS, COLUMNS)

    @triton.jit
    def _sum(
        wide, thin, gradient, at, first, last, columns, stride, rank_step, column_step, scaling,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        ranks = tl.arange(0, PADDED)
        total = tl.zeros((COLUMNS, PADDED), tl.float32)
        for token in range(first, last, ROWS):
            rows = (token + tl.arange(0, ROWS)).to(tl.int64)
            inside = (rows[:, None] < last) & (at[None, :] < columns)
            tile = tl.load(wide + rows[:, None] * stride + at[None, :], mask=inside, other=0.0)
            side = tl.load(thin + rows[:, None] * PADDED + ranks[None, :], mask=rows[:, None] < last, other=0.0)
            total += tl.dot(tl.trans(tile), side)
        inside = (ranks[None, :] < RANK) & (at[:, None] < columns)
        tl.store(gradient + ranks[None, :] * rank_step + at[:, None] * column_step, scaling * total, mask=inside)
