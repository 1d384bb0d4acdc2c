"""The checkpoint of a training loop of our own: one file, whole or absent, with a checksum."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abm_vision.abm.files import write_atomically
from abm_vision.runs.folder import CHECKPOINT
from abm_vision.runs.harness import Checkpoint, Prepared
from abm_vision.runs.records import AFRESH, Notes, Positive, Record, Seconds, Share, StepKind, checked


@dataclass
class Progress:
    """What a run has so far. `losses` has a value for every step, `seconds` and `accuracies` for epochs.

    `step` says how the last epoch's steps were run: eagerly, or as a CUDA graph.
    """

    epoch: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    accuracies: dict[int, float] = field(default_factory=dict)
    step: str = "eager"


class Content(Record):
    """A `Progress` in a checkpoint."""

    epoch: Positive
    losses: list[float]
    seconds: list[Seconds]
    accuracies: dict[int, Share]
    step: StepKind = "eager"


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The tensors that are trained, by name, as they are: not copied."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save(
    run: Prepared,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    notes: dict[str, Any],
    best: dict[str, Tensor] | None = None,
) -> None:
    """What an interrupted run is resumed from: trained weights, optimiser, progress, notes (plain JSON values).

    `best` is for a harness that keeps the weights of its best epoch, too; it finds them in `Checkpoint.state`.
    """
    state = {
        "schema": run.config.schema,
        "trained": trained(run.model),
        "best": best,
        "optimiser": optimiser.state_dict(),
        "progress": asdict(progress),
        "notes": json.dumps(notes),
    }
    whole = io.BytesIO()
    torch.save(state, whole)  # to a disk that is full it raises what nobody can tell from a mistake of its own
    content = whole.getvalue()
    write_atomically(run.folder / CHECKPOINT, lambda beside: beside.write_bytes(_checksum(content) + content))


def _checksum(content: bytes) -> bytes:
    """What a checkpoint begins with: torch reads flipped bits as they are."""
    return hashlib.sha256(content).digest()


def load(run: Prepared) -> Checkpoint | None:
    """The last whole checkpoint, or None.

    Raises:
        ValueError: it is damaged, or of another schema.
    """
    path = run.folder / CHECKPOINT
    if not path.is_file():
        return None
    state = _read(path, run.device, run.config.schema)
    try:
        progress, notes = state["progress"], json.loads(state["notes"])
        if not all(isinstance(value, Tensor) for value in state["trained"].values()):
            raise TypeError("what was trained is no tensor")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not whole ({error}); {AFRESH}") from None
    checked(progress, Content, str(path), AFRESH)
    checked(notes, Notes, str(path), AFRESH)
    return Checkpoint(notes, progress["epoch"], state)


def _read(path: Path, device: torch.device, schema: int | str) -> dict[str, Any]:
    checksum, content = (whole := path.read_bytes())[:32], whole[32:]
    if checksum != _checksum(content):
        raise ValueError(f"{path} is damaged, its content has another checksum; {AFRESH}")
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        found = state["schema"]
    except (RuntimeError, pickle.UnpicklingError, struct.error, EOFError, LookupError, TypeError, ValueError) as error:
        reason = str(error).partition(". ")[0] or type(error).__name__  # torch follows it with advice on unsafe loading
        raise ValueError(f"{path} cannot be read ({reason}); {AFRESH}") from None
    if found != schema:
        raise ValueError(f"{path} has schema {found}, this version reads {schema}; {AFRESH}")
    return state


def restore(run: Prepared, optimiser: torch.optim.Optimizer, checkpoint: Checkpoint | None) -> Progress:
    """Put a checkpoint's weights and optimiser state in place. Returns how far the run is; without one, nowhere.

    Raises:
        ValueError: they are not those of this model.
    """
    if checkpoint is None:
        return Progress()
    state, parameters = checkpoint.state, {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    shapes = [{name: tuple(v.shape) for name, v in found.items()} for found in (parameters, state["trained"])]
    try:
        if shapes[0] != shapes[1]:
            raise ValueError("it has other tensors")
        with torch.no_grad():
            for name, value in state["trained"].items():
                parameters[name].copy_(value)
        optimiser.load_state_dict(state["optimiser"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{run.folder / CHECKPOINT} does not fit this model ({error}); {AFRESH}") from None
    return Progress(**state["progress"])
