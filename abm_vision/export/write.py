"""Merge an adapter into a copy of its model, write that as one file, and compare what the file computes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from abm_vision.abm.files import write_atomically
from abm_vision.abm.loading import load_adapter
from abm_vision.images.description import build, read_description
from abm_vision.runs.folder import adapter_folder

ENDINGS = {"onnx": ".onnx", "torch": ".pt2", "timm": ".safetensors"}
NEEDED = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-3  # of the largest logit: float32, in another order of operations
LIMIT = 2**31  # bytes that one ONNX file can hold
BATCHES = (2, 1, 5)  # images; the first is what a graph is traced with


@dataclass(frozen=True)
class Exported:
    """A file, checked.

    Attributes:
        path: of the file.
        difference: largest absolute difference of a logit from the adapted model's, on random images in float32.
        largest: the largest absolute logit there, to compare it with.
    """

    path: Path
    difference: float
    largest: float

    def __str__(self) -> str:
        return f"{self.path}: largest difference {self.difference:.2g} from torch, of logits up to {self.largest:.3g}"


class _Pixels(nn.Module):
    """The model on uint8 pixels."""

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images.float() / 255 - self.mean) / self.std)


def merge(model: PeftModel) -> nn.Module:
    """A copy of the bare model in float32 on CPU, in evaluation mode, with the adapter in its weights."""
    return copy.deepcopy(model).float().cpu().merge_and_unload().eval()


def export(
    adapter: str | Path, to: str, out: str | Path, *, normalise: bool = False, weights: str | None = None
) -> Exported:
    """Write the model of a saved adapter, with the adapter merged into its weights, as one file.

    The input is `images`, float32 (batch, 3, size, size), normalised; with `normalise` uint8 RGB pixels of that shape,
    which the graph normalises. Any batch size. The output is `logits`, (batch, classes). What `abm.json` says of
    classes and preprocessing is in the metadata of an ONNX file or a checkpoint, and in a .pt2 as its extra file
    `abm.json`.

    Args:
        adapter: a run's folder, or the adapter's own.
        to: "onnx", "torch" (`torch.export`, .pt2) or "timm" (for `timm.create_model(..., checkpoint_path=...)`).
        out: the file, ending in .onnx, .pt2 or .safetensors.
        normalise: see above; not for "timm", whose file is weights alone.
        weights: of the base, as in `load_adapter`.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`; another ending or kind; the model cannot be exported, or its
            file computes something else. No file is left then.
        ModuleNotFoundError: a package for ONNX is missing.
        CannotWrite: an `OSError`: the file cannot be written.
    """
    check_request(to, out, normalise)
    folder, path = adapter_folder(adapter), Path(out)
    facts = read_description(folder)
    adapted = load_adapter(build(folder, weights), folder).eval()
    shape = facts["preprocessing"]
    merged: nn.Module = merge(adapted)
    reference: nn.Module = adapted
    if normalise:
        merged, reference = (_Pixels(one, shape["mean"], shape["std"]) for one in (merged, adapted))
    batches = [_random_images(count, shape["image_size"], normalise) for count in BATCHES]
    with torch.no_grad():
        expected = [reference(batch) for batch in batches]
    found: list[Exported] = []

    def write(beside: Path) -> None:
        run = _WRITERS[to](merged, batches[0], beside, facts)
        with torch.no_grad():
            found.append(_compared(path, [run(batch) for batch in batches], expected))

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, write)
    return found[0]


def check_request(to: str, out: str | Path, normalise: bool) -> None:
    """Raise a ValueError or ModuleNotFoundError for what no export can be."""
    if to not in ENDINGS:
        raise ValueError(f"to is {to!r}; it must be one of {', '.join(ENDINGS)}")
    if not str(out).endswith(ENDINGS[to]):
        raise ValueError(f"the file is {out}; for {to} its name must end in {ENDINGS[to]}")
    if normalise and to == "timm":
        raise ValueError("a checkpoint for timm is weights alone and cannot normalise: take --to onnx or torch")
    missing = [name for name in NEEDED if find_spec(name) is None] if to == "onnx" else []
    if missing:
        raise ModuleNotFoundError(f'ONNX needs {", ".join(missing)}: pip install -e ".[export]"')


def _random_images(count: int, size: int, pixels: bool) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    if pixels:
        return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return torch.randn(count, 3, size, size, generator=generator)


def _compared(path: Path, found: list[Tensor], expected: list[Tensor]) -> Exported:
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    largest = max(b.abs().max().item() for b in expected)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ValueError(
            f"{path} was not written: it would differ by {difference:.3g} from torch, of logits up to {largest:.3g}"
        )
    return Exported(path, difference, largest)


# ------------------------------------------------------------------- writers: each gives what runs the file it wrote

Runner = Callable[[Tensor], Tensor]


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except (torch._dynamo.exc.UserError, RuntimeError) as error:  # data-dependent forwards of some models
        raise ValueError(f"torch.export cannot trace this model: {str(error).splitlines()[0]}") from error


def _write_onnx(model: nn.Module, images: Tensor, path: Path, facts: Mapping[str, Any]) -> Runner:
    import onnxruntime

    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    if size >= LIMIT:
        raise ValueError(f"the model has {size / 2**30:.1f} GiB, an ONNX file holds 2: export it to torch")
    program = torch.onnx.export(
        _program(model, images), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    program.model.metadata_props.update(_metadata(facts))
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])


def _write_torch(model: nn.Module, images: Tensor, path: Path, facts: Mapping[str, Any]) -> Runner:
    about = {"abm.json": json.dumps({name: json.loads(text) for name, text in _metadata(facts).items()})}
    torch.export.save(_program(model, images), path, extra_files=about)
    return torch.export.load(path).module()


def _write_timm(model: nn.Module, images: Tensor, path: Path, facts: Mapping[str, Any]) -> Runner:
    state = {name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", **_metadata(facts)})
    options = {"num_classes": facts["num_classes"], **facts.get("model_args", {})}
    return timm.create_model(facts["model"], checkpoint_path=str(path), **options).eval()


def _metadata(facts: Mapping[str, Any]) -> dict[str, str]:
    """What whoever serves the file needs, as JSON texts."""
    named = ("model", "model_args", "num_classes", "classes", "preprocessing", "license")
    return {name: json.dumps(facts.get(name)) for name in named}


_WRITERS: Mapping[str, Callable[..., Runner]] = {"onnx": _write_onnx, "torch": _write_torch, "timm": _write_timm}
