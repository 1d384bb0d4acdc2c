"""Find which of timm's transformers can be adapted: every architecture is built without memory and searched.

    python benchmarks/families.py

A model is supported if every attention and every MLP of its blocks has LoRA sites and every MLP a boundary; it is
refused if `add_lora` raises its message. There is nothing in between: `tests/test_families.py` fails on such a model.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from unittest import mock

import timm
import torch
from timm.models._registry import _model_to_module
from torch import nn

from abm_vision import VIT, add_lora
from abm_vision.abm.files import write_json

RESULT = Path(__file__).parent / "results" / "families.json"

# timm's modules whose models attend. The first four hold the plain ViTs: vision_transformer (with registers, SwiGLU,
# parallel blocks), DeiT and DeiT III, BEiT and BEiTv2, EVA, EVA-02 and DINOv3.
PLAIN = ("vision_transformer", "deit", "beit", "eva")
OTHERS = tuple(
    """cait coat convit cpubone crossvit csatv2 davit deepseek_vit edgenext efficientformer efficientformer_v2
    efficientvit_mit efficientvit_msra fastvit gcvit gemma4_vit hiera hieradet_sam2 iformer levit lowformer maxxvit
    metaformer mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit shvit swiftformer swin_transformer
    swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins visformer vision_transformer_hybrid
    vision_transformer_relpos vision_transformer_sam vitamin volo xcit""".split()
)
# No attention or MLP of a block: heads, pooling, the MLPs that compute position biases, and convolutions by that name.
_OUTSIDE = re.compile(r"(^|\.)(head|attn_pool|shared_rel_pos|rel_pos|meta_mlp|mhca)(\.|$)")


def architectures() -> dict[str, list[str]]:
    """Map timm's modules to their architectures, for the transformers of the installed timm."""
    found = defaultdict(list)
    for name in timm.list_models():
        found[_model_to_module[name]].append(name)
    return {family: found[family] for family in (*PLAIN, *OTHERS) if family in found}


def build(name: str) -> nn.Module:
    """Build the architecture without memory, and without the draws for its weights, which take most of the time."""
    with torch.device("meta"), mock.patch("timm.layers.weight_init._trunc_normal_", lambda tensor, *_: tensor):
        return timm.create_model(name)


def uncovered(model: nn.Module) -> list[str]:
    """List attentions and MLPs of blocks without LoRA sites, and MLPs without a boundary, by their classes' names."""
    targets = [name for names in VIT.find_targets(model).values() for name in names]
    boundaries = [name for names in VIT.find_boundaries(model).values() for name in names]
    parts = [(n, type(m).__name__) for n, m in model.named_modules() if not _OUTSIDE.search(n)]
    missed = []
    for name, kind in parts:
        wanted = targets if re.search("attn|attention|mlp|swiglu|ffn", kind, re.I) else None
        if wanted is not None and not any(t.startswith(f"{name}.") for t in wanted):
            missed.append(f"{name} ({kind}) has no LoRA site")
        if re.search("mlp|swiglu|ffn", kind, re.I) and not any(b.startswith(f"{name}.") for b in boundaries):
            missed.append(f"{name} ({kind}) has no boundary")
    return missed


def refusal(model: nn.Module) -> str | None:
    """Return the message of `add_lora` for a model that is not supported, None for a supported one."""
    try:
        add_lora(model, rank=1)
    except ValueError as error:
        return str(error)
    return None


def main() -> None:
    RESULT.parent.mkdir(exist_ok=True)
    rows = []
    for family, names in architectures().items():
        supported = [name for name in names if refusal(build(name)) is None]
        rows.append({"family": family, "models": len(names), "supported": len(supported)})
        rows[-1]["refused"] = sorted(set(names) - set(supported))
        print(f"{family:28} {len(supported):4} of {len(names)}", flush=True)
    write_json(RESULT, {"command": "python benchmarks/families.py", "timm": timm.__version__, "rows": rows})


if __name__ == "__main__":
    main()
