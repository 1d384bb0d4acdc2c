"""The LoRA layer that trains on the merged weight.

Stock LoRA runs its two thin products beside the frozen one, reading every activation again: it is slower than
full fine-tuning. Here the forward pass is one product with W = W0 + s B A, and the backward pass

    dx = g W,    dA = s (g B)^T x,    dB = s g^T (x A^T)

never forms the full weight gradient g^T x and keeps no activation of width r. Merging costs r*in*out
multiplications, nothing beside the tokens*in*out of the product itself once there are enough tokens.

Shapes: x (..., in), g (..., out), W0 (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def merge_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W0 + s B A, summed in the finer of their precisions and rounded once to `dtype`: (out, in)."""
    finer = torch.promote_types(weight.dtype, lora_a.dtype)
    return torch.addmm(weight.to(finer), lora_b.to(finer), lora_a.to(finer), alpha=scaling).to(dtype)


class _MergedLoRA(torch.autograd.Function):
    """y = x (W0 + s B A)^T + bias, with gradients for x, A, B and bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        merged = merge_weight(weight, lora_a, lora_b, scaling, x.dtype)
        # Under autocast the copy in x's dtype is kept, as autocast itself keeps its cast of W0. Otherwise it is
        # merged again in the backward pass: a copy of every weight would cost more memory than LoRA saves.
        ctx.kept = merged.dtype != weight.dtype
        ctx.save_for_backward(x, merged if ctx.kept else weight, lora_a, lora_b)
        ctx.scaling = scaling
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))  # (..., out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        dx = dbias = da = db = None
        # The caller's autocast must not touch products whose precision the forward pass has settled.
        with torch.autocast(grad.device.type, enabled=False):
            if needs_x:
                dx = grad @ (weight if ctx.kept else merge_weight(weight, lora_a, lora_b, ctx.scaling, x.dtype))
            rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            inputs = x.reshape(-1, x.shape[-1])  # (tokens, in)
            if needs_bias:
                dbias = rows.sum(0)
            # Every product has the r rows on its left, (r, tokens): on CPU that is the faster side.
            if needs_a:
                da = ctx.scaling * ((lora_b.to(x.dtype).T @ rows.T) @ inputs).to(lora_a.dtype)  # (r, in)
            if needs_b:
                db = ctx.scaling * ((lora_a.to(x.dtype) @ inputs.T) @ rows).T.to(lora_b.dtype)  # (out, r)
        return dx, None, dbias, da, db, None


class MergedLinear(PeftLinear):
    """peft's `lora.Linear`, run on the merged weight wherever that is the same function.

    It applies to one active, unmerged adapter on a plain floating-point `nn.Linear`, without active LoRA dropout,
    LoRA bias or a variant such as DoRA, and with enough tokens to pay for the merging. Everything else is peft's
    own forward. Parameters, names, files and `merge`/`unmerge` are peft's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out); the dtype is the one that `nn.Linear` would give, autocast included."""
        adapter = self._adapter_to_merge() if not args and not kwargs else None
        dtype = _compute_dtype(x, self.base_layer.weight)
        if adapter is None or dtype is None or not self._merging_pays(x):
            return super().forward(x, *args, **kwargs)
        lora_b = self.lora_B[adapter]
        weight_b = lora_b.masked_weight() if isinstance(lora_b, BlockLinear) else lora_b.weight
        with torch.autocast(x.device.type, enabled=False):
            return _MergedLoRA.apply(
                x.to(dtype),
                self.base_layer.weight,
                self.base_layer.bias,
                self.lora_A[adapter].weight,
                weight_b,
                self.scaling[adapter],
            )

    def _adapter_to_merge(self) -> str | None:
        """The one adapter whose forward pass equals a product with the merged weight, if there is one."""
        if self.disable_adapters or self.merged or self.fan_in_fan_out or self.base_layer.weight.requires_grad:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1 or active[0] in self.lora_variant or self.lora_bias[active[0]]:
            return None
        dropout = self.lora_dropout[active[0]]
        if isinstance(dropout, nn.Dropout) and dropout.training:
            return None
        # A hook of somebody else's on an inner module expects that module to be called, and so does a wrapper (FSDP).
        inner = (self.base_layer, self.lora_A[active[0]], self.lora_B[active[0]])
        return active[0] if all(map(_is_bare, inner)) else None

    def _merging_pays(self, x: Tensor) -> bool:
        # Merging reads and writes in*out numbers, the two thin products tokens*(in + out).
        tokens = x.numel() // self.in_features
        return tokens * (self.in_features + self.out_features) >= self.in_features * self.out_features


def _is_bare(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, BlockLinear) and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which `F.linear(x, weight)` would run; None where it would refuse."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype if x.dtype == weight.dtype else None


def merged_linear_factory(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
) -> MergedLinear | None:
    """For peft's custom-module table: `MergedLinear` on plain linear layers, None (peft's own) on all others."""
    base_layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if type(base_layer) is not nn.Linear:  # quantised layers are subclasses
        return None
    return MergedLinear(target, adapter_name, config=config, **kwargs)


class BlockLinear(nn.Linear):
    """A `lora_B` of a fused qkv that adapts q and v only: B = [[Bq, 0], [0, 0], [0, Bv]], (3*dim, 2r).

    The zero blocks get neither value nor gradient, so they stay zero in training. In files it is an ordinary
    `lora_B.weight`.
    """

    mask: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BlockLinear:
        """Turn a (3*dim, 2r) `lora_B` into a block one, in place of it: the same Parameter object."""
        block = cls.__new__(cls)
        block.__dict__ = linear.__dict__.copy()
        dim, rank = linear.out_features // 3, linear.in_features // 2
        mask = torch.zeros_like(linear.weight)
        mask[:dim, :rank] = 1
        mask[2 * dim :, rank:] = 1
        block.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            block.weight.mul_(mask)
        return block

    def masked_weight(self) -> Tensor:
        """B with its zero blocks enforced: (3*dim, 2r)."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2r) to (..., 3*dim)."""
        return F.linear(x, self.masked_weight(), self.bias)
