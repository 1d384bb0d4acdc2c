"""Two operations of `MergedLinear` in half precision on CUDA, by Triton kernels: merging, and the gradients of A and B.

They read W0 once, x and g twice. A layer needs four launches, in the place of the one that casts a frozen model's W0.
Triton comes with torch on CUDA; where it builds no kernel, torch's products do the same.
Sums are in float32, in an order that is always the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from subprocess import SubprocessError
from typing import Any

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
MERGE = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4}
THIN = {"ROWS": 64, "COLUMNS": 128, "num_warps": 4, "num_stages": 3}
OUTER = {"ROWS": 128, "COLUMNS": 64, "SEGMENT": 1024, "num_warps": 4, "num_stages": 3}  # it adds up 1,024 tokens
OPTIONS = ("num_warps", "num_stages")  # of the compiler, not of a kernel


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
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _is_built(device: int) -> bool:
    """Whether Triton builds kernels for a device: it takes capability 8.0 and a C compiler."""
    if not _is_capable(device):
        return False
    tiny = torch.zeros(16, 16, device=f"cuda:{device}")
    try:
        merged = merge(tiny, tiny, tiny, 1.0, torch.bfloat16)
        factor_gradients(merged, tiny, merged, tiny, 1.0)
    except (OSError, RuntimeError, SubprocessError, TritonError) as error:
        reason = str(error).partition("\n")[0]
        warnings.warn(f"Triton builds no kernels here ({reason}): adapters train with more launches", stacklevel=2)
        return False
    return True


def merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W0 + s B A of `dtype`, summed in float32: (out, in).

    Args:
        weight: W0 (out, in), contiguous as the factors, of one of `DTYPES`, on a CUDA device.
        lora_a: A (r, in), r at most `RANKS`.
        lora_b: B (out, r).
        scaling: s.
        dtype: half precision.
    """
    merged = torch.empty_like(weight, dtype=dtype)
    (out, in_), rank = weight.shape, len(lora_a)
    grid = -(-out // MERGE["ROWS"]), -(-in_ // MERGE["COLUMNS"]), 1
    tensors = weight, lora_a, lora_b, merged
    with _on_device_of(weight):
        _launch(_merge, grid, tensors, (out, in_), float(scaling), RANK=rank, **MERGE)
    return merged


def factor_gradients(x: Tensor, lora_a: Tensor, grad: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """dA = s (g B)^T x and dB = s g^T (x A^T), one after the other: float32 (r in + out r).

    Args:
        x: (tokens, in), half precision, with columns side by side.
        lora_a: A (r, in), contiguous, of one of `DTYPES`; multiplied in x's.
        grad: g (tokens, out), of x's dtype, with columns side by side.
        lora_b: B (out, r), contiguous, of one of `DTYPES`; multiplied in x's.
        scaling: s, which multiplies in float32: in float16 a small factor would be rounded away.
    """
    (tokens, in_), out, rank = x.shape, grad.shape[1], len(lora_a)
    segments, padded = -(-tokens // OUTER["SEGMENT"]), max(16, 1 << (rank - 1).bit_length())
    thin = x.new_empty(2, tokens, padded)  # x A^T and g B, with columns of zeros
    partial = x.new_empty(segments, rank * (in_ + out), dtype=torch.float32)
    sizes = in_, out, x.stride(0), grad.stride(0)
    ranks = {"RANK": rank, "PADDED": padded}
    tiles = -(-in_ // OUTER["COLUMNS"]) - (-out // OUTER["COLUMNS"])
    with _on_device_of(x):
        by_tokens = -(-tokens // THIN["ROWS"]), 2, 1
        _launch(_thin, by_tokens, (x, lora_a, grad, lora_b, thin), sizes, tokens, **ranks, **THIN)
        _launch(_outer, (tiles, segments, 1), (x, grad, thin, partial), sizes, tokens, float(scaling), **ranks, **OUTER)
    return partial.sum(0)


def _on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    device = tensor.get_device()
    return nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device)


_BUILT: dict[Hashable, tuple[Any, list[int]]] = {}


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    *others: float,
    **constants: int,
) -> None:
    """`kernel[grid](*tensors, *sizes, *others, **constants)`; what is built already is called without Triton's search.

    That search runs in Python at every launch. Triton builds a kernel for dtypes, for sizes that are 1 or multiples of
    16, for addresses that are multiples of 16, and for its constants.
    """
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    key = kernel.fn, tensors[0].get_device(), sizes, *[t.dtype for t in tensors], *constants.values()
    if address % 16 == 0 and key in _BUILT:
        built, values = _BUILT[key]
        built[grid](*tensors, *sizes, *others, *values)
        return
    built = kernel[grid](*tensors, *sizes, *others, **constants)
    if address % 16 == 0 and built is not None:  # nothing is built in Triton's interpreter
        _BUILT[key] = built, [value for name, value in constants.items() if name not in OPTIONS]


# The same for torch's compiler, which sees no more of them than what they return.

merge_op = torch.library.custom_op("abm_lora::merge", merge, mutates_args=(), device_types="cuda")
factor_gradients_op = torch.library.custom_op(
    "abm_lora::factor_gradients", factor_gradients, mutates_args=(), device_types="cuda"
)


@merge_op.register_fake
def _(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(weight, dtype=dtype)


@factor_gradients_op.register_fake
def _(x: Tensor, lora_a: Tensor, grad: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return x.new_empty(len(lora_a) * (x.shape[1] + grad.shape[1]), dtype=torch.float32)


if triton is not None:

    @triton.jit
    def _merge(
        weight, a, b, merged, out_features, in_features, scaling,
        RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """One tile of W."""
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
        tl.store(merged + at, total.to(merged.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["tokens"])
    def _thin(
        x, a, g, b, thin, in_features, out_features, stride_x, stride_g, tokens,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """u = x A^T or v = g B for a tile of tokens."""
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        if tl.program_id(1) == 0:
            _times(x, a, thin, rows, tokens, in_features, stride_x, in_features, 1, RANK, PADDED, ROWS, COLUMNS)
        else:
            v = thin + tokens.to(tl.int64) * PADDED
            _times(g, b, v, rows, tokens, out_features, stride_g, 1, RANK, RANK, PADDED, ROWS, COLUMNS)

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
            total += tl.dot(tile, tl.load(of_factor, mask=inside, other=0.0).to(tile.dtype))
        at = rows[:, None].to(tl.int64) * PADDED + ranks[None, :]
        tl.store(thin + at, total.to(thin.dtype.element_ty), mask=rows[:, None] < tokens)

    @triton.jit(do_not_specialize=["tokens"])
    def _outer(
        x, g, thin, partial, in_features, out_features, stride_x, stride_g, tokens, scaling,
        RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SEGMENT: tl.constexpr,
    ):  # fmt: skip
        """dA = s v^T x or dB = s g^T u for a tile of columns, summed over a segment of tokens."""
        first = tl.program_id(1) * SEGMENT
        last = tl.minimum(first + SEGMENT, tokens)
        of_a = partial + tl.program_id(1) * RANK * (in_features + out_features)
        of_b = of_a + RANK * in_features
        tiles = tl.cdiv(in_features, COLUMNS)
        tile = tl.program_id(0)
        if tile < tiles:
            at = tile * COLUMNS + tl.arange(0, COLUMNS)
            v = thin + tokens.to(tl.int64) * PADDED
            _sum(
                x, v, of_a, at, first, last, in_features, stride_x, in_features, 1, scaling, RANK, PADDED, ROWS, COLUMNS
            )
        else:
            at = (tile - tiles) * COLUMNS + tl.arange(0, COLUMNS)
            _sum(g, thin, of_b, at, first, last, out_features, stride_g, 1, RANK, scaling, RANK, PADDED, ROWS, COLUMNS)

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
