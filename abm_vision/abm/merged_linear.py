"""The LoRA layer that trains on the merged weight.

Stock LoRA runs its two thin products beside the frozen one, reading every activation again: it is slower than
full fine-tuning. Here the forward pass is one product with W = W0 + s B A, and the backward pass

    dx = g W,    dA = s (g B)^T x,    dB = s g^T (x A^T)

never forms the full weight gradient g^T x and keeps no activation of width r. Merging costs r*in*out
multiplications, nothing beside the tokens*in*out of the product itself once there are enough tokens.

Shapes: x (..., in), g (..., out), W0 (out, in), A (r, in), B (out, r).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import dispatch_default
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from abm_vision.abm import kernels

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is a matrix of real numbers and nothing else: strided, floating-point, of torch's own class.

    Others may look like one: quantised weights whose dtype is floating-point (torchao), DTensors, sparse and nested
    tensors, complex numbers, and float8, which only stores.
    """
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.dtype in _FLOATS
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def merge_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W0 + s B A, summed in the finer of their precisions and rounded once to `dtype`: (out, in)."""
    finer = torch.promote_types(weight.dtype, lora_a.dtype)
    a, b = lora_a.to(finer), lora_b.to(finer)
    with _no_autocast(weight.device.type):
        return torch.addmm(weight.to(finer), b, a, alpha=scaling).to(dtype)


class _MergedLoRA(torch.autograd.Function):
    """y = x (W0 + s B A)^T + bias, with gradients for x, A, B and bias, of every order."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: float
    ) -> Tensor:
        by_kernels = kernels.kernels_fit(weight, lora_a, lora_b, x.dtype)
        merged = (_merge_by_kernel if by_kernels else merge_weight)(weight, lora_a, lora_b, scaling, x.dtype)
        # Under autocast the copy in x's dtype is kept, as autocast itself keeps its cast of W0. Otherwise it is
        # merged again in the backward pass: a copy of every weight would cost more memory than LoRA saves.
        kept = merged if merged.dtype != weight.dtype else None
        ctx.save_for_backward(x, weight, lora_a, lora_b, kept)
        ctx.scaling, ctx.by_kernels = scaling, by_kernels
        return F.linear(x, merged, None if bias is None else bias.to(x.dtype))  # (..., out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, merged = ctx.saved_tensors
        needs_x, _, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        by_kernels, dx, dbias, da, db = ctx.by_kernels, None, None, None, None
        # With create_graph=True all of them are differentiated in turn, by A and B too, which what is kept hides.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            merged, by_kernels = None, False
        # The caller's autocast must not touch products whose precision the forward pass has settled.
        with _no_autocast(grad.device.type):
            rows = grad.reshape(-1, grad.shape[-1])  # (tokens, out)
            inputs = x.reshape(-1, x.shape[-1])  # (tokens, in)
            if needs_x:
                if merged is None:
                    merge = _merge_by_kernel if by_kernels else merge_weight
                    merged = merge(weight, lora_a, lora_b, ctx.scaling, x.dtype)
                dx = (rows @ merged).view(x.shape)
            if needs_bias:
                dbias = rows.sum(0)
            if by_kernels and needs_a and needs_b:
                both = _gradients_by_kernels(inputs.contiguous(), lora_a, rows.contiguous(), lora_b, ctx.scaling)
                rank, in_ = lora_a.shape
                da = both.as_strided((rank, in_), (in_, 1)).to(lora_a.dtype)
                db = both.as_strided((len(lora_b), rank), (rank, 1), rank * in_).to(lora_b.dtype)
                return dx, None, dbias, da, db, None
            # Every product has the r rows on its left, (r, tokens): on CPU that is the faster side.
            if needs_a:
                da = ctx.scaling * ((lora_b.to(x.dtype).T @ rows.T) @ inputs).to(lora_a.dtype)  # (r, in)
            if needs_b:
                db = ctx.scaling * ((lora_a.to(x.dtype) @ inputs.T) @ rows).T.to(lora_b.dtype)  # (out, r)
        return dx, None, dbias, da, db, None


def _merge_by_kernel(*operands: Any) -> Tensor:
    return (kernels.merge_op if torch.compiler.is_compiling() else kernels.merge)(*operands)


def _gradients_by_kernels(*operands: Any) -> Tensor:
    return (kernels.factor_gradients_op if torch.compiler.is_compiling() else kernels.factor_gradients)(*operands)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast switched off, if it is on: where it is off, no context is entered at every layer."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class MergedLinear(PeftLinear):
    """peft's `lora.Linear`, run on the merged weight wherever that is the same function.

    It applies to one active, unmerged adapter on a plain floating-point `nn.Linear`, without active LoRA dropout,
    LoRA bias or a variant such as DoRA, and with enough tokens to pay for the merging. Everything else is peft's
    own forward: hooks and replaced forwards of inner modules, tensors that are not plain (`is_plain`), a scaling
    held as a tensor, forward-mode derivatives and `torch.func`. Parameters, names, files and `merge`/`unmerge` are
    peft's.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out); the dtype is the one that `nn.Linear` would give, autocast included."""
        operands = self._operands(x) if not args and not kwargs else None
        dtype = None if operands is None else _compute_dtype(x, operands[0])
        if operands is None or dtype is None or not self._merging_pays(x):
            return super().forward(x, *args, **kwargs)
        return _MergedLoRA.apply(x.to(dtype), *operands)

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor, float] | None:
        """W0, bias, A, B and s, if the forward pass is a product with the merged weight of one adapter."""
        if self.disable_adapters or self.merged or self.fan_in_fan_out or _is_watched():
            return None
        # This runs at every call, and attributes of nn.Module cost a microsecond each: from its tables they do not.
        layer = self._modules
        active = [name for name in self.active_adapters if name in layer["lora_A"]._modules]
        if len(active) != 1 or active[0] in self.lora_variant:
            return None
        lora_a, lora_b, dropout = (layer[kind]._modules[active[0]] for kind in ("lora_A", "lora_B", "lora_dropout"))
        base, scaling = layer["base_layer"], self.scaling[active[0]]
        if not (_is_bare(base, _LINEAR) and _is_bare(lora_a, _LINEAR) and _is_bare(lora_b, _LINEAR)):
            return None
        if not _is_bare(dropout, _DROPOUT) or (type(dropout) is nn.Dropout and dropout.training):
            return None
        weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
        a, b = _parameter(lora_a, "weight"), _parameter(lora_b, "weight")
        if not (is_plain(weight) and is_plain(a) and is_plain(b) and is_plain(x) and (bias is None or is_plain(bias))):
            return None
        if weight.requires_grad or x.is_meta or not isinstance(scaling, NUMBER):
            return None
        if _parameter(lora_a, "bias") is not None or _parameter(lora_b, "bias") is not None:
            return None
        return weight, bias, a, lora_b.trained_weight() if type(lora_b) is BlockLinear else b, scaling

    def _merging_pays(self, x: Tensor) -> bool:
        # Merging reads and writes in*out numbers, the two thin products tokens*(in + out).
        tokens = x.numel() // self.in_features
        too_few = tokens * (self.in_features + self.out_features) < self.in_features * self.out_features
        if torch.compiler.is_compiling():  # asking for the truth of a symbolic size would be a guard on it
            from torch.fx.experimental.symbolic_shapes import statically_known_true

            return not statically_known_true(too_few)
        return not too_few


NUMBER = (float, int)  # torch.compile of torch 2.8 does not know `float | int`
_LINEAR = {nn.Linear: nn.Linear.forward}  # and BlockLinear, below
_DROPOUT = {nn.Identity: nn.Identity.forward, nn.Dropout: nn.Dropout.forward}


def _is_bare(module: nn.Module, forwards: Mapping[type[nn.Module], Any]) -> bool:
    """Whether calling a module runs the forward of one of these classes and nothing else: no hook, no replacement."""
    return (
        type(module) in forwards
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and module._compiled_call_impl is None
        and "forward" not in module.__dict__
        and type(module).forward is forwards[type(module)]
    )


def _is_watched() -> bool:
    """Whether the call is of `torch.func`, in forward mode, traced, or seen by hooks on all modules."""
    return bool(_in_torch_func() or forward_ad._current_level >= 0 or torch.jit.is_tracing() or _has_any_global_hook())


@torch.compiler.assume_constant_result  # a graph belongs to one state of torch.func
def _in_torch_func() -> bool:
    return torch._C._are_functorch_transforms_active()


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    table = module._parameters
    return table[name] if name in table else getattr(module, name)  # FSDP 1 puts plain attributes in their place


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype | None:
    """The dtype in which `F.linear(x, weight)` would run; None where it would refuse."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return weight.dtype if x.dtype == weight.dtype else None


def merged_linear_factory(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> PeftLinear | None:
    """For peft's custom-module table: `MergedLinear` on plain linear layers, None (peft's own) on all others.

    peft makes the layer, so that every argument means what it means in peft; only its class is ours.
    """
    base_layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    if type(base_layer) is not nn.Linear or not is_plain(base_layer.weight):  # quantised layers are peft's others
        return None
    layer = dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is PeftLinear:
        layer.__class__ = MergedLinear
    return layer


class BlockLinear(nn.Linear):
    """A `lora_B` of a fused qkv that trains q and v only: B = [[Bq, 0], [0, 0], [0, Bv]], (3*dim, 2r).

    The zero blocks get no gradient, so they stay zero in training. The weight itself is the one truth: what it holds
    is what the forward pass, merging and files use. In files it is an ordinary `lora_B.weight`.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> BlockLinear:
        """Turn a (3*dim, 2r) `lora_B` into a block one, in place of it: the same Parameter object.

        Raises:
            ValueError: it holds something outside the two blocks.
        """
        block = cls.__new__(cls)
        block.__dict__ = linear.__dict__.copy()
        if not linear.weight.is_meta and linear.weight.detach().masked_fill(block.mask, 0).any():
            raise ValueError("a lora_B for q and v alone has values outside its two blocks: it adapts k as well")
        return block

    @property
    def mask(self) -> Tensor:
        """Where the two blocks are: boolean (3*dim, 2r). No buffer, which `to_empty()` would fill with anything."""
        dim, rank = self.out_features // 3, self.in_features // 2
        mask = torch.zeros_like(self.weight, dtype=torch.bool)
        mask[:dim, :rank] = True
        mask[2 * dim :, rank:] = True
        return mask

    def trained_weight(self) -> Tensor:
        """B as it is, with a gradient in its two blocks alone: (3*dim, 2r)."""
        if not self.weight.requires_grad:
            return self.weight
        return torch.where(self.mask, self.weight, self.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """(..., 2r) to (..., 3*dim)."""
        return F.linear(x, self.trained_weight(), self.bias)


_LINEAR[BlockLinear] = BlockLinear.forward
