"""Seconds and peak memory of our initialisations against the reference procedure of boundary matching.

    python benchmarks/abm_init.py

The reference procedure, written plainly here: two full models, batch 1, both run in full at each of 100 steps, AdamW
at 3e-4 on stock peft's layers. Ours makes as many sample passes in larger batches, keeps the reference's signs as
bits, and runs nothing above the last boundary. Both match all 12 layers of a DINOv2 ViT-S/14 at margin 0.5 on
rendered dSprites location at 70 px, in turn, from the same adapter, on the same samples. Compared are the hinge loss
and the match rate on held-out images, so that speed is not bought with quality, and the time of one training epoch of
1,000 images. Memory is the growth of the process's peak over the adapted model, each in a process of its own.

Beside these two: `local`, the layer-local mode on the same 100 samples, and `aligned`, the aligned initialisation
with its default of 128, which does not lower the hinge loss but must keep boundaries.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peak import peak_mib
from peft import PeftModel
from torch import Tensor, nn

import vtab_tasks
from abm_vision import (
    ABMConfig,
    add_lora,
    create_backbone,
    initialize_lora_abm_weights,
    initialize_lora_aligned_weights,
)
from abm_vision.abm.files import write_json
from abm_vision.images.data import Images, load_all, preprocessing_for
from abm_vision.images.train import Progress, choose_attention, make_optimiser, train
from abm_vision.runs.device import autocast, has_fast_bf16
from abm_vision.runs.provenance import environment
from abm_vision.vtab import make_config

RESULT = Path(__file__).parent / "results" / "abm_init.json"
SAMPLES, MARGIN = 100, 0.5
# 20 steps of 5: as many sample passes.
OURS = ABMConfig(margin=MARGIN, samples=SAMPLES, steps=20, batch_size=5, learning_rate=1e-3)
LOCAL = ABMConfig(margin=MARGIN, samples=SAMPLES, fit="local")
VARIANTS = ("reference", "ours", "defaults", "local", "aligned")


def adapted(seed: int, device: torch.device, precision: str, merged: bool) -> tuple[PeftModel, Images, Images]:
    """Build the adapted ViT, the training images, and held-out images."""
    backbone, _ = create_backbone("vit_small_patch14_dinov2.lvd142m", 16, 70)
    preprocessing = preprocessing_for(backbone, 70)
    train_data = vtab_tasks.load("dsprites_loc", "train800val200", source="rendered")
    held_out = vtab_tasks.load("dsprites_loc", "test", source="rendered").subset(200, seed)
    torch.manual_seed(seed)
    model = add_lora(backbone, merged_linear=merged).to(device)
    choose_attention(model, device, precision)
    sets = [Images(*load_all(d, preprocessing), preprocessing, device) for d in (train_data, held_out)]
    return model, *sets


def record(model: nn.Module, pixels: Tensor) -> list[Tensor]:
    """Record the input of every `mlp.act` in a whole forward pass."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    recorded: list[Tensor] = []
    handles = [
        block.mlp.act.register_forward_pre_hook(lambda _, args: recorded.append(args[0])) for block in bare.blocks
    ]
    model(pixels)
    for handle in handles:
        handle.remove()
    return recorded


def hinge(model: nn.Module, reference: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Eq. (22), arXiv:2511.19145, and the match rate from two models."""
    with torch.no_grad():
        signs = [z.float().sign() for z in record(reference, pixels)]
    loss, match = 0, 0
    for depth, (z, sign) in enumerate(zip(record(model, pixels), signs, strict=True)):
        weight = ((depth + 1) / len(signs)) ** 2 / len(signs)
        loss = loss + weight * (MARGIN - sign * z.float()).clamp_min(0).square().mean()
        match = match + ((z > 0) == (sign > 0)).float().mean() / len(signs)
    return loss, match


def reference_procedure(model: PeftModel, reference: nn.Module, images: Images, seed: int) -> None:
    optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=3e-4)
    batches = images.batches(1, seed, 0)
    for _ in range(SAMPLES):
        with autocast(images.pixels.device, args.precision):
            loss, _ = hinge(model, reference, next(batches)[0])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def ours(model: PeftModel, images: Images, seed: int, variant: str) -> None:
    with autocast(images.pixels.device, args.precision):
        if variant == "aligned":
            initialize_lora_aligned_weights(model, images.batches(32, seed, 0))
        elif variant == "defaults":  # 36 samples, 9 steps of 4
            initialize_lora_abm_weights(model, images.batches(64, seed, 0), show_progress_bar=False)
        elif variant == "local":
            initialize_lora_abm_weights(model, images.batches(SAMPLES, seed, 0), LOCAL, show_progress_bar=False)
        else:
            initialize_lora_abm_weights(model, images.batches(20, seed, 0), OURS, show_progress_bar=False)


def works(seed: int, variant: str) -> tuple[Callable[[], None], PeftModel, Images]:
    """Return the work to be timed, the model that it changes, and the held-out images."""
    device = torch.device(args.device)
    model, images, held_out = adapted(seed, device, args.precision, merged=variant != "reference")
    model.eval()
    if variant != "reference":
        return lambda: ours(model, images, seed, variant), model, held_out
    # Making the second model is part of the procedure: its memory counts, its time is next to nothing.
    return lambda: reference_procedure(model, copy.deepcopy(model).unload().eval(), images, seed), model, held_out


@torch.no_grad()
def held_out_state(model: PeftModel, held_out: Images) -> dict[str, float]:
    reference = copy.deepcopy(model).unload().eval()
    with autocast(held_out.pixels.device, args.precision):
        loss, match = hinge(model.eval(), reference, next(held_out.batches(200, 0, 0))[0])
    return {"held_out_loss": loss.item(), "held_out_match": match.item()}


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def epoch_seconds() -> float:
    """Time one training epoch of the quick preset: 1,000 images in batches of 64."""
    config = make_config(epochs=2)
    model, images, _ = adapted(0, torch.device(args.device), args.precision, merged=True)
    progress = Progress()
    train(model, make_optimiser(model, config), images, config, args.precision, progress, lambda _: None)
    return min(progress.seconds)


def memory_in_own_process(variant: str) -> float:
    command = [sys.executable, __file__, "--memory", variant, "--device", args.device, "--precision", args.precision]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    if args.memory:
        work, _, _ = works(0, args.memory)
        print(json.dumps(peak_mib(work, args.device)))
        return
    rounds = []
    for seed in range(args.seeds):
        row = {"seed": seed}
        for variant in VARIANTS if seed % 2 else VARIANTS[::-1]:
            work, model, held_out = works(seed, variant)
            before = held_out_state(model, held_out)
            row[variant] = {"seconds": timed(work), **held_out_state(model, held_out), "before": before}
        row["ratio"] = row["reference"]["seconds"] / row["ours"]["seconds"]
        row["epoch_seconds"] = epoch_seconds()
        for variant in VARIANTS:
            row[variant]["share_of_epoch"] = row[variant]["seconds"] / row["epoch_seconds"]
        rounds.append(row)
        print(json.dumps(row), flush=True)
    summary = {
        "ratio": statistics.median(r["ratio"] for r in rounds),
        "share_of_epoch": {v: statistics.median(r[v]["share_of_epoch"] for r in rounds) for v in VARIANTS},
        "peak_mib": {v: memory_in_own_process(v) for v in VARIANTS},
    }
    print(json.dumps(summary))
    RESULT.parent.mkdir(exist_ok=True)
    write_json(
        args.out,
        {
            "command": "python benchmarks/abm_init.py " + " ".join(sys.argv[1:]),
            "precision": args.precision,
            "environment": environment(args.device),
            "rounds": rounds,
            "summary": summary,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if has_fast_bf16(torch.device(args.device)) else "fp32")
    main()
