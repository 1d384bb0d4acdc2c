"""Files of a run of VTAB-1K: what `abm_vision.runs.folder` does not know of. All whole or absent."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import struct
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from abm_vision.abm.files import write_atomically, write_json
from abm_vision.runs import folder as files
from abm_vision.runs.folder import ADAPTER, FAILURE, RESULT
from abm_vision.runs.log import LOGS
from abm_vision.runs.markup import code, markdown, quoted
from abm_vision.vtab.config import SCHEMA, RunConfig
from abm_vision.vtab.train import Progress

CHECKPOINT = "checkpoint.pt"
CURVES, INFORMATION_LOSS = "curves.png", "information_loss.png"
ENTRIES = (
    "config test data num_classes weights preprocessing precision trainable_parameters abm reference information_loss "
    "loss_per_step seconds_per_epoch top1_per_epoch seconds images_per_second peak_memory_mib environment "
    "reference_only"
).split()


def clear(folder: Path) -> None:
    """Remove whatever a run has left in its folder but the configuration."""
    for name in (RESULT, CHECKPOINT, CURVES, INFORMATION_LOSS, FAILURE):
        (folder / name).unlink(missing_ok=True)
    for name in (ADAPTER, *LOGS):
        shutil.rmtree(folder / name, ignore_errors=True)


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None for one that is not.

    Raises:
        ValueError: it was written under another schema, or is no result.
    """
    return files.read_result(folder, SCHEMA, ENTRIES, {field.name for field in fields(RunConfig)})


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
    write_atomically(folder / CHECKPOINT, lambda beside: beside.write_bytes(whole.getbuffer()))


def load_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The last whole checkpoint, or None.

    Raises:
        ValueError: it is damaged, or of another schema.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        schema = state["schema"]
        whole = {**state, "progress": Progress(**state["progress"]), "notes": json.loads(state["notes"])}
    except (RuntimeError, pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0] or type(error).__name__  # torch follows it with advice on unsafe loading
        raise ValueError(f"{path} cannot be read ({reason}); --rerun, or deleting its folder, starts afresh") from None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, this version reads {SCHEMA}; --rerun, or deleting its folder, starts afresh"
        )
    return whole


def restore(model: nn.Module, optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a checkpoint's weights and optimiser state in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["trained"].items():
            parameters[name].copy_(value)
    optimiser.load_state_dict(state["optimiser"])


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """The last file of a run: with it the run is finished, and its checkpoint is no longer needed."""
    write_json(folder / RESULT, result)
    for name in (CHECKPOINT, FAILURE):
        (folder / name).unlink(missing_ok=True)


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
