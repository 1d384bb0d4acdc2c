"""Files of a run of VTAB-1K: what `abm_vision.runs.folder` does not know of. All whole or absent."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from abm_vision.abm.files import write_atomically, write_json
from abm_vision.runs import folder as files
from abm_vision.runs import records
from abm_vision.runs.folder import ADAPTER, FAILURE, RESULT
from abm_vision.runs.log import LOGS
from abm_vision.runs.markup import code, markdown, quoted
from abm_vision.runs.records import Count, Notes, Positive, Record, Seconds, Share, checked, settings_of
from abm_vision.vtab.config import SCHEMA, RunConfig
from abm_vision.vtab.train import Progress

CHECKPOINT = "checkpoint.pt"
CURVES, INFORMATION_LOSS = "curves.png", "information_loss.png"
_AFRESH = "--rerun, or deleting its folder, starts afresh"
ORIGIN = {"training images", "training labels", "test images", "test labels", "weights", "initialisation"}
LEFT = (CHECKPOINT, FAILURE)  # what a finished run has no use for


class Test(Record):
    """The score."""

    top1: Share
    correct: Count
    count: Positive
    split: str
    split_size: Positive

    @model_validator(mode="after")
    def _parts(self) -> Test:
        if not self.correct <= self.count <= self.split_size:
            raise ValueError(f"{self.correct} correct of {self.count} counted, of {self.split_size} there are")
        if abs(self.top1 * self.count - self.correct) > 0.5:
            raise ValueError(f"top1 is {self.top1}, and {self.correct} of {self.count} are correct")
        return self


class Data(Record):
    """Where images are from."""

    task: str
    split: str
    source: Literal["tfds", "folder", "rendered"]
    description: str
    images: Positive


class Splits(Record):
    """What was trained on, and what was scored."""

    train: Data
    test: Data


class Weights(Record):
    """A `WeightSource`."""

    name: str
    origin: str
    location: str
    sha256: str | None


class Shape(Record):
    """A `Preprocessing`."""

    image_size: Annotated[int, Field(ge=1, le=2**14)]
    interpolation: Literal["nearest", "nearest-exact", "bilinear", "bicubic"]  # what torchvision knows of tensors
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]


class Speed(Record):
    """Images per second."""

    train: Annotated[float, Field(gt=0)]
    test: Annotated[float, Field(gt=0)]


class Result(records.Result):
    """`result.json` of a run of VTAB-1K."""

    config: settings_of(RunConfig)
    test: Test
    data: Splits
    num_classes: Positive
    weights: Weights
    preprocessing: Shape
    top1_per_epoch: dict[str, Share]
    images_per_second: Speed
    reference_only: bool

    @model_validator(mode="after")
    def _every_step(self) -> Result:
        for part, data in (("training", self.data.train), ("test", self.data.test)):
            if data.task != self.config["task"]:
                raise ValueError(f"the {part} data are of {data.task}, the run is of {self.config['task']}")
        if self.test.count != self.data.test.images or self.test.split != self.data.test.split:
            raise ValueError(f"{self.test.count} images of {self.test.split} are not the test data")
        if absent := sorted(ORIGIN - set(self.origin)):
            raise ValueError(f"its origin lacks {', '.join(absent)}")
        steps = -(-self.data.train.images // self.config["batch_size"])
        if len(self.loss_per_step) != steps * self.config["epochs"]:
            raise ValueError(f"{len(self.loss_per_step)} losses are not {steps} in every epoch")
        absent = sorted({"data", "weights", "lora", "test"} - set(self.seconds))
        if absent:
            raise ValueError(f"it lacks seconds.{', seconds.'.join(absent)}")
        return self


class Checkpoint(Record):
    """`checkpoint.pt` without its tensors."""

    epoch: Positive
    losses: list[float]
    seconds: list[Seconds]
    accuracies: dict[int, Share]


def clear(folder: Path) -> None:
    """Remove whatever a run has left in its folder but the configuration."""
    files.remove(folder, (RESULT, CHECKPOINT, CURVES, INFORMATION_LOSS, FAILURE, ADAPTER, *LOGS))


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for one that is not.

    Raises:
        ValueError: it was written under another schema, or is no result.
    """
    return files.read_result(folder, Result, SCHEMA)


def read_finished(folder: str | Path) -> dict[str, Any]:
    """The result of a run that must be finished.

    Raises:
        FileNotFoundError: it is not, or there is none.
    """
    result = read_result(Path(folder))
    if result is None:
        raise FileNotFoundError(f"no {RESULT} in {folder}: pass the folder of a finished run")
    return result


def save_checkpoint(
    folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, progress: Progress, notes: dict[str, Any]
) -> None:
    """What a killed run needs to go on: trained weights, optimiser, progress, and notes (plain JSON values)."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {
        "schema": SCHEMA,
        "trained": trained,
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
        "notes": json.dumps(notes),
    }
    whole = io.BytesIO()
    torch.save(state, whole)  # to a disk that is full it raises what nobody can tell from a mistake of its own
    content = whole.getvalue()
    write_atomically(folder / CHECKPOINT, lambda beside: beside.write_bytes(_checksum(content) + content))


def _checksum(content: bytes) -> bytes:
    """What a checkpoint begins with: torch reads flipped bits as they are."""
    return hashlib.sha256(content).digest()


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The last whole checkpoint, or None.

    Raises:
        ValueError: it is damaged, or of another schema.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    checksum, content = (whole := path.read_bytes())[:32], whole[32:]
    if checksum != _checksum(content):
        raise ValueError(f"{path} is damaged, its content has another checksum; {_AFRESH}")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        schema = state["schema"]
    except (RuntimeError, pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0] or type(error).__name__  # torch follows it with advice on unsafe loading
        raise ValueError(f"{path} cannot be read ({reason}); {_AFRESH}") from None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}; {_AFRESH}")
    try:
        progress, notes = state["progress"], json.loads(state["notes"])
        if not all(isinstance(value, Tensor) for value in state["trained"].values()):
            raise TypeError("what was trained is no tensor")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not whole ({error}); {_AFRESH}") from None
    checked(progress, Checkpoint, str(path), _AFRESH)
    checked(notes, Notes, str(path), _AFRESH)
    return {**state, "progress": Progress(**progress), "notes": notes}


def restore(model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any], folder: Path) -> None:
    """Put a checkpoint's weights and optimiser state in place.

    Raises:
        ValueError: they are not those of this model.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shapes = [{name: tuple(v.shape) for name, v in found.items()} for found in (parameters, state["trained"])]
    try:
        if shapes[0] != shapes[1]:
            raise ValueError("it has other tensors")
        with torch.no_grad():
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
        optimiser.load_state_dict(state["optimiser"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / CHECKPOINT} does not fit this model ({error}); {_AFRESH}") from None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """The last file of a run: with it the run is finished, and its checkpoint is no longer needed."""
    write_json(folder / RESULT, result)
    files.remove(folder, LEFT)


def model_card(result: dict[str, Any]) -> str:
    """What a person needs to know of a saved adapter: what it does, how well, and how to load it."""
    config, test, weights = result["config"], result["test"], result["weights"]
    name, file = quoted(config["model"]), quoted(config["weights"])
    arguments = f"{name}, {result['num_classes']}, {config['image_size']}, {file}"
    train_data, test_data = (
        f"{result['data'][k]['images']} images ({markdown(result['data'][k]['description'])})"
        for k in ("train", "test")
    )
    return f"""---
library_name: peft
base_model: {quoted(f"timm/{config['model']}")}
tags: [lora, abm-lora, timm]
---
# {markdown(config["model"])}, adapted to {config["task"]}

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}, qkv: {config["qkv"]}), started with
{code(config["init"])}.
Trained for {config["epochs"]} epochs on {train_data}, seed {config["seed"]}.

Top-1 on {test["split"]}: {100 * test["top1"]:.2f} % of {test_data}.
Base weights: {weights["origin"]}, sha256 {weights["sha256"]}.

```python
from abm_vision import create_backbone, load_adapter

model, _ = create_backbone({arguments})  # name, classes, pixels, weights
model = load_adapter(model, "path/to/this/folder").eval()
```

Stock peft loads it too: `PeftModel.from_pretrained(model, "path/to/this/folder")`.
"""
