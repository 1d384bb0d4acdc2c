"""What initialisations cost on a GPU, in seconds and in epochs of 16 steps.

    python benchmarks/gpu_init.py [--inits abm eva lora_ga] [--model vit_small_patch14_dinov2] [--image-size 112]

One of every kind runs first, so that libraries and kernels are loaded; the smallest of `--repeats` counts. An epoch
is 16 steps of 64 images, run eagerly and as a CUDA graph. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abm_vision import INITIALIZERS, TrainingStep, add_lora, initialize_lora
from abm_vision.abm.files import write_json
from abm_vision.initializers import Needs
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "gpu_init.json"
CLASSES, STEPS, BATCH = 16, 16, 64
SAMPLES = 256  # images that the loader has; each initialisation takes as many as its settings say


def adapted(args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=CLASSES, img_size=args.image_size).cuda()
    return add_lora(model, rank=8, alpha=8)


def seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def epoch(args: argparse.Namespace, mode: str, batch: tuple[Tensor, Tensor]) -> float:
    """Seconds of 16 steps."""

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1])

    model = adapted(args).train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    passes = TrainingStep(model, loss_fn, mode)

    def steps() -> None:
        for _ in range(STEPS):
            passes(batch)
            optimiser.step()
            optimiser.zero_grad()

    return [seconds(steps) for _ in range(3)][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = [name for name, row in INITIALIZERS.items() if row.needs and Needs.REFERENCE not in row.needs]
    parser.add_argument("--inits", nargs="+", default=["abm", "abm_aligned", "eva", "lora_ga"], choices=alone)
    parser.add_argument("--model", default="vit_small_patch14_dinov2")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    images = torch.randn(SAMPLES, 3, args.image_size, args.image_size)
    labels = torch.arange(SAMPLES) % CLASSES
    loader = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    epochs = {mode: epoch(args, mode, tuple(t.cuda() for t in loader[0])) for mode in ("eager", "graph")}

    def once(name: str) -> float:
        model = adapted(args)
        with torch.autocast("cuda", torch.bfloat16):
            return seconds(lambda: initialize_lora(model, name, loader, show_progress_bar=False))

    rows = {name: [once(name) for _ in range(args.repeats + 1)][1:] for name in args.inits}
    for name, taken in rows.items():
        print(f"{name:16s} {min(taken):6.2f} s, {min(taken) / epochs['eager']:5.2f} eager epochs, "
              f"{min(taken) / epochs['graph']:6.2f} as graphs")  # fmt: skip
    print(f"an epoch of {STEPS} steps: {epochs['eager']:.2f} s eager, {epochs['graph']:.3f} s as graphs")
    setting = {"model": args.model, "image_size": args.image_size, "samples": SAMPLES, "batch": BATCH}
    write_json(args.out, {"environment": environment("cuda"), **setting, "epoch_seconds": epochs, "seconds": rows})


if __name__ == "__main__":
    main()
