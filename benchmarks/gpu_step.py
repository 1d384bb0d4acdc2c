"""A training step on a GPU: frozen floor, full fine-tuning, stock peft, ours; eagerly, as a CUDA graph, compiled.

    python benchmarks/gpu_step.py [--models vit_base_patch16_224] [--modes eager graph compiled] [--ranks 8]

The floor is the same model with nothing but the head trainable and gradients still flowing to the input. Variants take
turns; the smallest of several timings counts, as nothing but disturbance makes one longer. Modes: `eager`; `graph`, the
passes captured by `TrainingStep`; `compiled`, blocks compiled one by one, and then captured; `reduce`, the whole model
compiled by `torch.compile(mode="reduce-overhead")`; `callable`, `torch.cuda.make_graphed_callables`. AdamW is fused and
outside the graph in all of them. Kernels, and the time inside them, are the profiler's. Weights are random.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_step import VARIANTS, build

from abm_vision import TrainingStep
from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "gpu_step.json"
MODES = ("eager", "graph", "compiled", "reduce", "callable")
SMALL, BASE, LARGE = (f"vit_{size}_patch16_224" for size in ("small", "base", "large"))
PLAN = (  # models, ranks, modes, variants
    ((SMALL, BASE), (8,), ("eager", "graph", "compiled"), VARIANTS),
    ((BASE,), (64, 256), ("graph",), ("floor", "ours")),
    ((LARGE,), (8,), ("eager",), VARIANTS),
)
ROUNDS, STEPS = 8, 5  # timings of a variant, steps in each


def prepared(model: nn.Module, mode: str, images: Tensor) -> nn.Module:
    """The model as the mode has it."""
    if mode == "compiled":
        for block in (model.get_base_model() if hasattr(model, "get_base_model") else model).blocks:
            block.compile()
    if mode == "reduce":
        return torch.compile(model, mode="reduce-overhead")
    if mode == "callable":
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return torch.cuda.make_graphed_callables(model, (images,))
    return model


def stepper(model: nn.Module, mode: str, images: Tensor, labels: Tensor, precision: torch.dtype) -> Callable[[], None]:
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    model = prepared(model, mode, images)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cuda", precision, enabled=precision != torch.float32, cache_enabled=mode != "callable"):
            return F.cross_entropy(model(batch[0]), batch[1])

    passes = TrainingStep(model, loss_fn, "graph" if mode in ("graph", "compiled") else "eager")

    def step() -> None:
        passes((images, labels))
        optimiser.step()
        optimiser.zero_grad()
        images.grad = None

    return step


def kernels(step: Callable[[], None]) -> tuple[int, float]:
    """How many kernels a step launches, and the milliseconds spent inside them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return len(on_device), sum(e.device_time for e in on_device) / 1e3


def milliseconds(step: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    for _ in range(STEPS):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / STEPS


def measure(
    args: argparse.Namespace, name: str, rank: int, mode: str, variants: tuple[str, ...]
) -> dict[str, dict[str, Any]]:
    """Milliseconds, kernels, MiB beyond the model, of every variant."""
    images = torch.randn(args.batch, 3, 224, 224, device="cuda", requires_grad=True)
    labels = torch.randint(0, 16, (args.batch,), device="cuda")
    precision = getattr(torch, args.precision)
    steps, rows = {}, {}
    for variant in variants:
        torch._dynamo.reset()
        model = build(variant, name, 224, "cuda", rank)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        steps[variant] = step = stepper(model, mode, images, labels, precision)
        for _ in range(4):
            step()
        torch.cuda.synchronize()
        mib = (torch.cuda.max_memory_allocated() - held) / 2**20
        count, inside = kernels(step)
        rows[variant] = {"kernels": count, "inside_ms": inside, "mib": mib}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for _ in range(ROUNDS):
        for variant, step in steps.items():
            times[variant].append(milliseconds(step))
    for variant, taken in times.items():
        rows[variant] |= {"ms": min(taken), "ms_of_rounds": taken}
    return rows


def line(row: dict[str, Any]) -> str:
    cells = "  ".join(
        f"{variant} {found['ms']:6.2f} ms ({found['kernels']}, {found['inside_ms']:.2f}) {found['mib']:.0f} MiB"
        for variant, found in row["variants"].items()
    )
    return f"{row['model']} {row['precision']} rank {row['rank']} {row['mode']:9s} {cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[SMALL, BASE, LARGE])
    parser.add_argument("--modes", nargs="+", choices=MODES, help="others than each model's and rank's own")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64, 256])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device")
    rows: list[dict[str, Any]] = []
    for models, ranks, modes, variants in PLAN:
        for name, rank, mode in itertools.product(models, ranks, args.modes or modes):
            if name not in args.models or rank not in args.ranks:
                continue
            chosen = tuple(v for v in variants if v in args.variants)
            setting = {"model": name, "mode": mode, "batch": args.batch, "rank": rank, "precision": args.precision}
            rows.append({**setting, "variants": measure(args, name, rank, mode, chosen)})
            print(line(rows[-1]), flush=True)
            write_json(args.out, {"environment": environment("cuda"), "rows": rows})
            torch.cuda.empty_cache()
    if not rows:
        parser.error("nothing of the plan has these models and ranks")


if __name__ == "__main__":
    sys.exit(main())
