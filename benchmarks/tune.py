"""`abm-tune` beside a plain script of timm and stock peft, on two folders of real photographs, with the same settings.

    python benchmarks/tune.py [--epochs 4] [--seeds 0 1]

The folders are those of `photographs.py`: CIFAR-10's and tiles of scikit-image's pictures, each with a part to choose
the epoch by and one to test on. Both adapt a DINOv2 ViT-S/14 at 112 px: rank 8 on qkv, proj, fc1 and fc2, peft's
default initialisation, AdamW, the same schedule, batches and precision. The script is what one would write: pictures
are decoded by a `DataLoader` in every epoch, the best epoch is kept, the test part is classified at the end. Each run
is a process of its own; the two take turns, and which is first alternates.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from photographs import WRITERS
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from abm_vision import create_backbone
from abm_vision.abm.files import write_json
from abm_vision.images.train import learning_rate
from abm_vision.runs.device import autocast, choose_precision, resolve_device
from abm_vision.runs.provenance import environment
from abm_vision.tune import TuneConfig, make_config

RESULT = Path(__file__).parent / "results" / "tune.json"


def settings(folder: str, seed: int, epochs: int) -> TuneConfig:
    return make_config(data=folder, init="kaiming", seed=seed, epochs=epochs, image_size=112)


def stock(config: TuneConfig) -> dict[str, Any]:
    """Train with timm and peft alone, and give seconds of every epoch and top-1."""
    device = resolve_device("auto")
    precision = choose_precision("auto", device)
    torch.manual_seed(config.seed)
    classes = ImageFolder(f"{config.data}/train").classes
    model, _ = create_backbone(config.model, len(classes), config.image_size)  # timm's, also where there is no hub
    size = {"input_size": (3, config.image_size, config.image_size), "crop_pct": 1.0}
    transform = create_transform(**resolve_model_data_config(model) | size)
    targets = ["qkv", "attn.proj", "fc1", "fc2"]
    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets, modules_to_save=["head"])
    model = get_peft_model(model, lora).to(device)
    parts = {part: ImageFolder(f"{config.data}/{part}", transform) for part in ("train", "val", "test")}
    train = DataLoader(parts["train"], config.batch_size, shuffle=True)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    best, chosen, seconds = -1.0, None, []
    for epoch in range(config.epochs):
        begin = time.perf_counter()
        model.train()
        for step, (images, labels) in enumerate(train):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, epoch * len(train) + step, len(train))
            with autocast(device, precision):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begin)
        if (found := top1(model, parts["val"], device, precision)) >= best:
            best, chosen = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(chosen)
    return {"epochs": seconds, "validation": best, "test": top1(model, parts["test"], device, precision)}


@torch.no_grad()
def top1(model: nn.Module, images: ImageFolder, device: torch.device, precision: str) -> float:
    model.eval()
    correct = 0
    for batch, labels in DataLoader(images, 64):
        with autocast(device, precision):
            correct += int((model(batch.to(device)).argmax(-1).cpu() == labels).sum())
    return correct / len(images)


def ours(config: TuneConfig, out: Path) -> list[str]:
    flags = {name: getattr(config, name) for name in ("init", "seed", "epochs", "image_size")}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["-m", "abm_vision.tune", config.data, *words, "--out", str(out), "--json"]


def measured(command: list[str]) -> dict[str, Any]:
    """Run a process, and give what it printed with the seconds from its start to its end."""
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, *command], check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    if "seconds_per_epoch" in found:  # a result file
        found = {
            "epochs": found["seconds_per_epoch"],
            "validation": found["validation"]["top1"],
            "test": found["test"]["top1"],
        }
    return found | {"seconds": time.perf_counter() - begin}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--stock", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stock:
        folder, seed, epochs = args.stock
        print(json.dumps(stock(settings(folder, int(seed), int(epochs)))))
        return
    runs = []
    with tempfile.TemporaryDirectory() as place:
        for name, write in WRITERS.items():
            folder = Path(place, name)
            write(folder)
            for k, seed in enumerate(args.seeds):
                config = settings(str(folder), seed, args.epochs)
                commands = {
                    "stock": [__file__, "--stock", str(folder), str(seed), str(args.epochs)],
                    "ours": ours(config, Path(place, "results")),
                }
                for who in list(commands)[:: -1 if k % 2 else 1]:
                    runs.append({"data": name, "seed": seed, "who": who, **measured(commands[who])})
                    print(json.dumps(runs[-1]), flush=True)
    device = resolve_device("auto")
    about = {"precision": choose_precision("auto", device), "environment": environment(str(device))}
    command = "python benchmarks/tune.py " + " ".join(sys.argv[1:])
    write_json(args.out, {"command": command.strip(), "epochs": args.epochs, **about, "runs": runs})


if __name__ == "__main__":
    main()
