"""The model card of an adapter on a timm model: how to load it with timm and peft alone, its base, data and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from abm_vision.runs.markup import code, markdown, quoted

_SEPARATE = """for module in model.modules():  # or its attention would pass the adapter by
    if hasattr(module, "qkv_bias_separate"):
        module.qkv_bias_separate = True
"""


def model_card(facts: Mapping[str, Any], model: nn.Module, text: str = "") -> str:
    """What a person needs to know of a saved adapter.

    Args:
        facts: what `abm.json` says.
        model: that it is saved from.
        text: Markdown on data, results and limits; its own title, if it begins with one.
    """
    name = facts.get("model")
    hub = f"base_model: {quoted(facts['hub'])}\n" if facts.get("hub") else ""
    if not text.startswith("#"):
        title = f"# LoRA adapter for {markdown(name or type(model).__name__)}"
        text = f"{title}\n\n{text or 'Nothing was said of its data and results (`save_adapter(..., card=...)`).'}"
    return f"""---
library_name: peft
{hub}tags: [lora, abm-lora, timm, image-classification]
---
{text.rstrip()}

{_base(facts)}
{_outputs(facts)}
{_loading(facts, model) if name else ""}"""


def _base(facts: Mapping[str, Any]) -> str:
    weights, name = facts.get("weights"), facts.get("model")
    lines = [f"Base model: {code(name)}." if name else "Base model: not recorded."]
    if weights:
        known = f"{weights['origin']}, sha256 {weights['sha256']}" if weights["sha256"] else "random"
        lines.append(f"Base weights: {known}.")
    lines.append(f"Licence of the base model: {markdown(facts.get('license') or 'not recorded by timm')}.")
    if facts.get("init"):
        lines.append(f"Initialised by {code(facts['init'])}.")
    return "\n".join(lines)


def _outputs(facts: Mapping[str, Any]) -> str:
    classes, shape = facts.get("classes"), facts.get("preprocessing")
    named = ", ".join(map(code, classes)) if classes else f"{facts['num_classes']}, without recorded names"
    lines = [f"Classes, in the order of the outputs: {named}."]
    if shape:
        way = {"squash": "squashed to a square", "center": f"cropped to the middle {shape['crop_pct']:.1%}"}
        size = f"{shape['image_size']} px, {shape['interpolation']}"
        how = way.get(shape.get("crop_mode"), shape.get("crop_mode"))
        lines.append(f"Images: {size}, {how}; mean {shape['mean']}, std {shape['std']} of pixels in [0, 1].")
    return "\n\n".join(lines) + "\n"


def _loading(facts: Mapping[str, Any], model: nn.Module) -> str:
    options = {"num_classes": facts["num_classes"], **facts.get("model_args", {})}
    sizes = ", ".join(f"{name}={value!r}" for name, value in options.items())
    separate = any(hasattr(module, "qkv_bias_separate") for module in model.modules())
    weights = facts.get("weights") or {"origin": "hub"}
    file = weights["origin"] in ("file", "none")
    which = f"of sha256 {weights['sha256']}" if weights.get("sha256") else "(they were random)"
    note = f"  # then load the base weights {which}" if file else ""
    return f"""```python
import timm
from peft import PeftModel

model = timm.create_model({quoted(facts["model"])}, pretrained={not file}, {sizes}){note}
{_SEPARATE if separate else ""}model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()
```

With this package: `model = abm_vision.load_adapter("path/to/this/folder")`.
"""
