"""Seconds and peak memory of `information_loss` on a ViT-B/16 at 224 px, 64 images.

    python benchmarks/information_loss.py

Random weights and random images: neither time nor memory depends on them. Each way of cutting the 64 images into
batches runs in a process of its own; memory is the growth of its peak over the adapted model. One batch keeps
one full gradient at a time, several keep one a layer but fewer activations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import timm
import torch
from peak import peak_mib

from abm_vision import VIT, add_lora, information_loss
from abm_vision.abm.files import write_json
from abm_vision.images.train import choose_attention
from abm_vision.runs.device import autocast, has_fast_bf16
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "information_loss.json"
IMAGES, BATCHES = 64, (4, 16, 64)


def measure(batch: int) -> dict[str, float]:
    device = torch.device(args.device)
    precision = "bf16" if has_fast_bf16(device) else "fp32"
    torch.manual_seed(0)
    model = add_lora(timm.create_model("vit_base_patch16_224", num_classes=16)).to(device)
    choose_attention(model, device, precision)
    images, labels = torch.randn(IMAGES, 3, 224, 224, device=device), torch.arange(IMAGES, device=device) % 16
    batches = list(zip(images.split(batch), labels.split(batch), strict=True))
    reports = []

    def work() -> None:
        with autocast(device, precision):
            reports.append(information_loss(model, batches, VIT.loss_fn))

    peak = peak_mib(work, args.device)
    return {"batch": batch, "seconds": reports[0].seconds, "peak_mib": peak, "precision": precision}


def in_own_process(batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--batch", str(batch), "--device", args.device]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    if args.batch:
        print(json.dumps(measure(args.batch)))
        return
    rows = [in_own_process(batch) for batch in BATCHES]
    content = {"command": "python benchmarks/information_loss.py", "images": IMAGES, "rows": rows}
    write_json(RESULT, {**content, "environment": environment(args.device)})
    print(json.dumps(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    main()
