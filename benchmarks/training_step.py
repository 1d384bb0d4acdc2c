"""Seconds and peak memory of one training step: frozen floor, stock peft, ours, full fine-tuning.

    python benchmarks/training_step.py [--models vit_small_patch14_dinov2] [--image-sizes 112 224] [--rounds 11]

The floor is the same model with nothing but the head trainable and gradients still flowing to the input, which no
adapter can undercut. Variants take turns within every round, so that a drift of the machine's speed affects all alike;
reported are medians over rounds and ratios to the floor of the same round. Weights are random: time does not depend
on them. Memory is the growth of the process's peak over the built model, each variant in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from peak import peak_mib
from torch import nn

from abm_vision import add_lora
from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment

VARIANTS = ("floor", "peft", "ours", "full")
RESULT = Path(__file__).parent / "results" / "training_step.json"


def build(variant: str, name: str, image_size: int, device: str, rank: int = 8, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=image_size, num_classes=16, **options)
    if variant in ("peft", "ours"):
        model = add_lora(model, rank=rank, merged_linear=variant == "ours")
    elif variant == "floor":
        model.requires_grad_(False)
        model.get_classifier().requires_grad_(True)
    return model.train().to(device)


def stepper(model: nn.Module, image_size: int, batch: int, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Make one step of AdamW; the input requires a gradient so that the floor's backward pass is complete."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, foreach=True)
    images = torch.randn(batch, 3, image_size, image_size, device=device, requires_grad=True)
    labels = torch.randint(0, 16, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        images.grad = None

    return step


def timed(step: Callable[[], None], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def time_variants(args: argparse.Namespace, name: str, size: int, batch: int, dtype: torch.dtype) -> dict:
    steps = {}
    for variant in VARIANTS:
        model = build(variant, name, size, args.device)
        if args.compile:
            model = torch.compile(model)
        steps[variant] = stepper(model, size, batch, dtype, args.device)
    return take_turns(steps, args.rounds, args.device)


def take_turns(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict:
    """Measure median seconds of every variant, and its ratio to "floor", and to "ours" if it is there, in a round."""
    seconds: dict[str, list[float]] = {v: [] for v in steps}
    for round_ in range(rounds + 2):
        order = list(steps) if round_ % 2 else list(steps)[::-1]
        taken = {v: timed(steps[v], device) for v in order}
        if round_ >= 2:  # two rounds of warm-up
            for variant, value in taken.items():
                seconds[variant].append(value)

    def ratio(times: list[float], others: list[float]) -> float:
        return statistics.median(t / o for t, o in zip(times, others, strict=True))

    return {
        v: {
            "seconds": statistics.median(times),
            "seconds_min_max": [min(times), max(times)],
            "ratio_to_floor": ratio(times, seconds["floor"]),
        }
        | ({"ratio_to_ours": ratio(times, seconds["ours"])} if "ours" in seconds else {})
        for v, times in seconds.items()
    }


def peak_memory(variant: str, name: str, size: int, batch: int, dtype: torch.dtype, device: str) -> float:
    """Measure the MiB that three steps need beyond the model itself."""
    step = stepper(build(variant, name, size, device), size, batch, dtype, device)
    return peak_mib(lambda: [step() for _ in range(3)], device)


def memory_in_own_process(variant: str, name: str, size: int, batch: int, dtype: torch.dtype, device: str) -> float:
    setting = [variant, name, str(size), str(batch), str(dtype).removeprefix("torch."), device]
    output = subprocess.run(
        [sys.executable, __file__, "--memory", *setting], check=True, capture_output=True, text=True
    )
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch14_dinov2"])
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[112, 224])
    parser.add_argument("--batch", type=int, help="images a step; default 32 at up to 112 px, 16 above")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--memory", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        variant, name, size, batch, dtype, device = args.memory
        print(json.dumps(peak_memory(variant, name, int(size), int(batch), getattr(torch, dtype), device)))
        return
    rows = []
    for name in args.models:
        for size in args.image_sizes:
            for dtype in (getattr(torch, d) for d in args.dtypes):
                batch = args.batch or (32 if size <= 112 else 16)
                setting = (name, size, batch, dtype)
                measured = time_variants(args, *setting)
                for variant in VARIANTS:
                    measured[variant]["peak_mib"] = memory_in_own_process(variant, *setting, args.device)
                rows.append(
                    {"model": name, "image_size": size, "batch": batch, "dtype": str(dtype), "variants": measured}
                )
                print(json.dumps(rows[-1], indent=1), flush=True)
    command = "python benchmarks/training_step.py " + " ".join(sys.argv[1:])
    write_json(
        args.out,
        {"command": command.strip(), "rounds": args.rounds, "environment": environment(args.device), "rows": rows},
    )


if __name__ == "__main__":
    main()
