"""VIT: the `Backbone` of timm's vision transformers. Nothing here imports timm."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from abm_vision.abm.host import Backbone, is_projection

# Patterns match whole module names. `_INSIDE` excludes what is not part of a block: attention pooling and
# classifier heads, and the small MLPs that compute position biases inside an attention.
_INSIDE = r"(?!.*(?:attn_pool|rel_pos|meta_mlp|cpb_mlp|pos_embed|merger|aligner|head)\b)(?:.+\.)?"
_ATTENTION = r"(?:\w*attn\w*|factoratt_crpe\d?|xca|token_mixer|e_mhsa)"
_QKV = r"(?:qkv|qkv_proj|kv|q|k|v|qk|[qkv]_proj|w[qkv]|attn)"
_OUT = r"(?:proj|out_proj|o_proj|proj_l|proj_w)"
_MLP = r"(?:mlp\d?|mlp_in)"
_FC = r"(?:fc1|fc2|fc1_g|fc1_x|w[012]|ln[12]|conv[123]|gate_proj|up_proj|down_proj)"
_WRAPPED = r"(?:\.ln)?(?:\.linear)?"  # LeViT and Gemma wrap the projection
# Blocks with one projection for attention and MLP hold the parts themselves; a shared projection is of both kinds.
_SHARED = r"in_proj|out_proj"

# Attention classes whose fused projection gives q, k and v one after the other (others interleave them by head).
_Q_THEN_K_THEN_V = (
    "timm.layers.attention",
    "timm.models.beit",
    "timm.models.cait",
    "timm.models.eva",
    "timm.models.hiera",
    "timm.models.mvitv2",
    "timm.models.swin_transformer",
    "timm.models.swin_transformer_v2",
    "timm.models.swin_transformer_v2_cr",
    "timm.models.twins",
    "timm.models.vision_transformer_relpos",
    "timm.models.vision_transformer_sam",
    "timm.models.xcit",
)


_PATCHES = ("patches", "patch_coord", "patch_valid")


def _timm_model(model: nn.Module) -> nn.Module:
    """The model, or the one inside transformers' `TimmWrapperForImageClassification`."""
    return getattr(model, "timm_model", model)


def _is_timm_transformer(model: nn.Module) -> bool:
    return any(t.__module__.startswith("timm.models.") for t in type(_timm_model(model)).__mro__)


def _head_modules(model: nn.Module) -> list[str]:
    """The classifier's modules (two in distilled models), by identity: names differ between families."""
    if not hasattr(_timm_model(model), "get_classifier"):
        return []
    classifier = _timm_model(model).get_classifier()
    heads = list(classifier) if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]
    trainable = [h for h in heads if isinstance(h, nn.Module) and any(True for _ in h.parameters())]
    return [name for name, module in model.named_modules() if any(module is h for h in trainable)]


def _fused_qkv(model: nn.Module) -> list[str]:
    def parent(name: str) -> nn.Module:
        return model.get_submodule(name.rpartition(".")[0])

    names = [n for n, m in model.named_modules() if n.endswith(".qkv") and is_projection(m)]
    return [n for n in names if type(parent(n)).__module__ in _Q_THEN_K_THEN_V]


def _prepare(model: nn.Module, adapted: list[str]) -> None:
    """Make every adapted layer run.

    The attention of BEiT, SwinV2, and of EVA and DINOv3 with a bias on `qkv` reads `self.qkv.weight` itself, so an
    adapter around `qkv` would never be called; with `qkv_bias_separate` it calls the layer, and computes the same.
    """
    for name in adapted:
        parent = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".qkv") and hasattr(parent, "qkv_bias_separate"):
            parent.qkv_bias_separate = True


def _forward(model: nn.Module, batch: Any) -> Any:
    """Run images, (images, ...) or a mapping with "pixel_values", "image", "images", or NaFlexViT's "patches"."""
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    if "patches" in batch:  # from timm's NaFlex loader
        return model({key: batch[key] for key in _PATCHES if key in batch})
    for key in ("pixel_values", "image", "images"):
        if key in batch:
            return model(batch[key])
    raise KeyError(f"no images among the batch's keys {sorted(batch)}; expected pixel_values, image or images")


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy on (images, labels), or on a mapping with "labels", "label" or "target"."""
    labels = _labels(batch)
    if labels is None:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no labels: let the loader yield (images, labels), or pass "
            "loss_fn=lambda model, batch: ..."
        )
    answer = _forward(model, batch)
    return F.cross_entropy(getattr(answer, "logits", answer), labels)  # transformers' models return a record


def _labels(batch: Any) -> Tensor | None:
    if isinstance(batch, (tuple, list)):
        return batch[1] if len(batch) > 1 and isinstance(batch[1], Tensor) else None
    if isinstance(batch, Tensor):
        return None
    return next((batch[key] for key in ("labels", "label", "target") if key in batch), None)


def _valid_patches(batch: Any, stack: str) -> Tensor | None:
    """Mask (batch, patches) of NaFlexViT, whose images have different numbers of patches and are padded."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    return inputs.get("patch_valid") if isinstance(inputs, Mapping) else None


def _describe(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    from abm_vision.images.description import describe

    if not hasattr(model, "timm_model"):
        return describe(model, given)
    # transformers' wrapper: its adapter has other names, so that it is no adapter of the timm model inside.
    return {
        name: fact for name, fact in describe(model.timm_model, given).items() if name not in ("model", "model_args")
    }


def _card(facts: Mapping[str, Any], model: nn.Module, text: str) -> str:
    from abm_vision.images.card import model_card

    return model_card(facts, model, text)


def _build(folder: Path, weights: str | None) -> nn.Module:
    from abm_vision.images.description import build  # loads timm

    return build(folder, weights)


VIT = Backbone(
    name="timm vision transformer",
    matches=_is_timm_transformer,
    target_modules={
        "attention": rf"{_INSIDE}{_ATTENTION}\.(?:{_QKV}|{_OUT}){_WRAPPED}|{_INSIDE}\d+\.(?:{_SHARED}|attn_out_proj)",
        "mlp": rf"{_INSIDE}{_MLP}\.{_FC}{_WRAPPED}|{_INSIDE}\d+\.(?:{_SHARED}|mlp_out_proj)",
    },
    boundary_modules={"blocks": rf"{_INSIDE}{_MLP}\.act\d?|{_INSIDE}\d+\.mlp_act"},
    key_modules=r".*\.(?:k|k_proj|wk)(?:\.linear)?",
    fused_qkv=_fused_qkv,
    head_modules=_head_modules,
    prepare=_prepare,
    forward_fn=_forward,
    loss_fn=_loss,
    token_mask_fn=_valid_patches,
    describe=_describe,
    card=_card,
    build=_build,
)
