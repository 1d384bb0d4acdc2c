"""Files of `export`: how far they are from torch on photographs, and milliseconds an image in each way of running.

    python benchmarks/export.py [--rounds 15]

First a DINOv2 ViT-S/14 at 112 px, tuned for one epoch by `abm-tune` on CIFAR-10's photographs of `photographs.py`, in
float32 on the test photographs of one of their classes: with the adapter beside the weights, merged, and from the ONNX
file in onnxruntime, in batches of 1 and 16, taking turns. Then one model of other families each, with random weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from photographs import write_cifar10
from torch import Tensor

from abm_vision import add_lora, create_backbone, load_adapter, save_adapter
from abm_vision.abm.files import write_json
from abm_vision.export.write import ENDINGS, export, merge
from abm_vision.images.data import Preprocessing
from abm_vision.images.description import read_description
from abm_vision.images.photos import read_photo
from abm_vision.runs.provenance import environment
from abm_vision.tune import make_config, run

RESULT = Path(__file__).parent / "results" / "export.json"
BATCHES = (1, 16)
FAMILIES = {  # of timm, with the side of their images in pixels
    "vit_small_patch16_224": 224,
    "deit3_small_patch16_224": 224,
    "beit_base_patch16_224": 224,
    "eva02_tiny_patch14_224": 224,
    "swinv2_tiny_window8_256": 256,
}


def tuned(place: Path, rounds: int) -> dict[str, Any]:
    """Tune, export to every kind, compare on photographs, and time."""
    write_cifar10(place / "cifar10")
    result = run(make_config(data=str(place / "cifar10"), epochs=1, image_size=112), place / "results", quiet=True)
    adapter = Path(result["folder"], "adapter")
    files = {to: export(adapter, to, place / f"model{ending}") for to, ending in ENDINGS.items()}
    adapted = load_adapter(adapter).eval()
    preprocessing = Preprocessing(**read_description(adapter)["preprocessing"])
    photos = [read_photo(path) for path in sorted((place / "cifar10" / "test" / "ship").iterdir())]
    images = preprocessing.normalise(preprocessing.resize(photos))
    session = onnxruntime.InferenceSession(files["onnx"].path, providers=["CPUExecutionProvider"])
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "adapter": adapted,
        "merged": merge(adapted),
        "onnxruntime": lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0]),
    }
    with torch.no_grad():
        logits = {name: way(images) for name, way in ways.items()}
        spent = {str(batch): timed(ways, images[:batch], rounds) for batch in BATCHES}
    return {
        "difference": {name: (found - logits["adapter"]).abs().max().item() for name, found in logits.items()},
        "largest_logit": logits["adapter"].abs().max().item(),
        "photographs": len(images),
        "bytes": {to: found.path.stat().st_size for to, found in files.items()},
        "milliseconds": spent,
    }


def timed(ways: dict[str, Callable[[Tensor], Tensor]], images: Tensor, rounds: int) -> dict[str, float]:
    """Measure the median milliseconds an image; the ways take turns."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 2):
        for name in list(ways)[:: -1 if round_ % 2 else 1]:
            begin = time.perf_counter()
            ways[name](images)
            if round_ >= 2:  # two rounds of warm-up
                spent[name].append(1e3 * (time.perf_counter() - begin) / len(images))
    return {name: statistics.median(values) for name, values in spent.items()}


def family(name: str, size: int, place: Path) -> dict[str, Any]:
    """Export a model with random weights and a random adapter to every kind."""
    torch.manual_seed(0)
    base, _ = create_backbone(name, 10, size, weights="none")
    torch.save(base.state_dict(), place / f"{name}.pth")
    model = add_lora(create_backbone(name, 10, size, weights=str(place / f"{name}.pth"))[0])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key or ("modules_to_save" in key and parameter.ndim == 2):  # some heads are next to nothing
                parameter.normal_(std=0.05)
    save_adapter(model, place / name)
    row: dict[str, Any] = {"model": name}
    for to, ending in ENDINGS.items():
        try:
            found = export(place / name, to, place / f"{name}{ending}")
            row[to] = {"difference": found.difference, "largest_logit": found.largest}
        except ValueError as error:
            row[to] = {"refused": str(error)}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = tuned(Path(folder), args.rounds)
        print(found, flush=True)
        families = []
        for name, size in FAMILIES.items():
            families.append(family(name, size, Path(folder)))
            print(families[-1], flush=True)
    about = {"rounds": args.rounds, "environment": environment("cpu"), "onnxruntime": onnxruntime.__version__}
    command = "python benchmarks/export.py " + " ".join(sys.argv[1:])
    write_json(args.out, {"command": command.strip(), **about, "tuned": found, "families": families})


if __name__ == "__main__":
    main()
