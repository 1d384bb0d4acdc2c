"""What `result.json` of every run on text holds, and the model card of its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import model_validator

from abm_vision.abm.arguments import count
from abm_vision.runs.markup import code, markdown, quoted
from abm_vision.runs.records import Positive, Record, Result

CHECKPOINTS, NOTES = "checkpoints", "notes.json"
_STAND_IN = "\nThe base model is a tiny stand-in: it shows that the pipeline works, and nothing more.\n"


class Weights(Record):
    """A `nlp_ext.models.Weights`."""

    location: str
    revision: str | None
    sha256: str
    tiny: bool
    dequantised: str | None


class TextResult(Result):
    """`result.json` of a run on text; harnesses add to it."""

    weights: Weights
    tiny: bool
    processes: Positive
    steps_per_epoch: Positive

    @model_validator(mode="after")
    def _whole_epochs(self) -> TextResult:
        """But for the last, where the steps are bounded."""
        whole = self.steps_per_epoch * self.config["epochs"]
        steps = min(self.config["max_steps"] or whole, whole)
        if (len(self.loss_per_step), len(self.seconds_per_epoch)) != (steps, -(-steps // self.steps_per_epoch)):
            found = f"{len(self.loss_per_step)} losses and {len(self.seconds_per_epoch)} times"
            raise ValueError(f"{found} are not those of {steps} steps, {self.steps_per_epoch} an epoch")
        return self


def marks(result: dict[str, Any]) -> str:
    """What kind of data and model a result is about."""
    return ", ".join([result["data"]["train"]["source"]] + ["tiny stand-in model"] * result["tiny"])


def model_card(
    result: dict[str, Any], *, tag: str, title: str, training: str, base: str = "", loader: str, more: str = ""
) -> str:
    """What a person needs to know of a saved adapter: what it does, how well, and how to load it.

    Args:
        result: the run's.
        tag: of the kind of model or task.
        title: what the model was adapted to.
        training: on what it was trained, and how well it does.
        base: how the frozen weights are kept.
        loader: transformers' class of models.
        more: what else can be done with the adapter.
    """
    config, weights, tiny = result["config"], result["weights"], result["tiny"]
    hub = f"base_model: {quoted(config['model'])}\n" if weights["revision"] else ""
    made_here = tiny or weights["dequantised"] is not None
    name = quoted(config["model"])
    place = Path(config["model"]).expanduser()
    called = place.name if place.exists() else config["model"]
    steps, epochs = len(result["loss_per_step"]), count(config["epochs"], "epoch")
    trained = count(steps, "step") if steps == config["max_steps"] else epochs
    revision = f" at {markdown(weights['revision'])}" if weights["revision"] else ""
    dequantised = f", dequantised from {markdown(weights['dequantised'])}" if weights["dequantised"] else ""
    return f"""---
library_name: peft
{hub}tags: [lora, abm-lora, {tag}]
---
# {markdown(called)}, {title}

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}), initialised by {code(config["init"])}.
Trained for {trained} on {training}
{_STAND_IN if tiny else ""}
Base weights: {markdown(weights["location"])}{revision}{dequantised}{base}, sha256
{weights["sha256"]}.

```python
from peft import PeftModel
from transformers import {loader}, AutoTokenizer
{"from nlp_ext.models import model_folder" if made_here else ""}
model = {loader}.from_pretrained({f"model_folder({name})" if made_here else name})
model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```
{more}"""
