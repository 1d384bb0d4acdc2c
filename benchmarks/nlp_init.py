"""Seconds of boundary matching on T5 against the reference procedure of the paper's code.

    python benchmarks/nlp_init.py [--seeds 3]

The reference procedure, written plainly: two full models, batch 1, both run in full at each of 100 steps, AdamW at 3e-4
on stock peft's layers, every block of encoder and decoder, margin 0.5. Ours has its defaults: few steps on few samples,
the reference's signs kept as bits, and nothing run above the last boundary. Both work on the same fresh adapter, in
turn, on the same sentences of the grammar's SST-2 (not GLUE), on T5-Base's shape with random
weights and on tiny-t5. Compared are boundary loss and match rate on 100 other sentences.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from nlp_step import build
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, ByT5Tokenizer, DataCollatorForSeq2Seq

from abm_vision.abm.files import write_json
from abm_vision.runs.device import autocast, has_fast_bf16
from abm_vision.runs.provenance import environment
from nlp_ext import ABMConfig, add_lora, initialize_lora_abm_weights
from nlp_ext.glue import synthetic
from nlp_ext.glue.tasks import get_task
from nlp_ext.t5 import T5
from nlp_ext.tiny import tiny_folder

RESULT = Path(__file__).parent / "results" / "nlp_init.json"
SAMPLES, MARGIN = 100, 0.5
OURS = ABMConfig(margin=MARGIN, samples=SAMPLES)
Batch = dict[str, Tensor]


def sentences() -> list[dict[str, list[int]]]:
    tokenizer, task = ByT5Tokenizer(), get_task("sst2")
    return [
        {"input_ids": tokenizer(task.source(e)).input_ids, "labels": tokenizer(task.target(e["label"])).input_ids}
        for e in synthetic.examples("sst2", "train")[: 2 * SAMPLES]
    ]


def batches(rows: list[dict[str, list[int]]], size: int, device: torch.device) -> Iterator[Batch]:
    collate = DataCollatorForSeq2Seq(ByT5Tokenizer())
    for k in range(0, len(rows), size):
        yield {name: t.to(device) for name, t in collate([dict(row) for row in rows[k : k + size]]).items()}


def record(model: nn.Module, batch: Batch) -> dict[str, list[Tensor]]:
    """Record the input of every activation, by stack, in a whole forward pass."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    recorded: dict[str, list[Tensor]] = {}
    handles = []
    for stack, names in T5.find_boundaries(bare).items():
        recorded[stack] = []
        for name in names:
            hook = lambda _, args, kept=recorded[stack]: kept.append(args[0])  # noqa: E731
            handles.append(bare.get_submodule(name).register_forward_pre_hook(hook))
    model(**batch)
    for handle in handles:
        handle.remove()
    return recorded


def hinge(model: nn.Module, reference: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute Eq. (22), arXiv:2511.19145, and the match rate from two models; padding does not count."""
    with torch.no_grad():
        wanted = record(reference, batch)
    found = record(model, batch)
    layers = sum(map(len, wanted.values()))
    loss, match = 0, 0
    for stack, zs in found.items():
        mask = T5.token_mask_fn(batch, stack)
        for depth, (z, r) in enumerate(zip(zs, wanted[stack], strict=True)):
            z, sign = z[mask].float(), r[mask].float().sign()
            weight = ((depth + 1) / len(zs)) ** 2 / layers
            loss = loss + weight * (MARGIN - sign * z).clamp_min(0).square().mean()
            match = match + ((z > 0) == (sign > 0)).float().mean() / layers
    return loss, match


def reference_procedure(model: PeftModel, rows: list[dict[str, list[int]]], device: torch.device) -> None:
    reference = copy.deepcopy(model).unload().eval()
    optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=3e-4)
    for batch in batches(rows, 1, device):
        with autocast(device, args.precision):
            loss, _ = hinge(model, reference, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def ours(model: PeftModel, rows: list[dict[str, list[int]]], device: torch.device) -> None:
    with autocast(device, args.precision):
        initialize_lora_abm_weights(model, batches(rows, 20, device), OURS, show_progress_bar=False)


VARIANTS: dict[str, Callable[..., None]] = {"reference": reference_procedure, "ours": ours}


def adapted(name: str, seed: int, merged: bool, device: torch.device) -> PeftModel:
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_folder(name)) if name == "tiny-t5" else build(name)
    torch.manual_seed(seed)
    return add_lora(base, merged_linear=merged).to(device).eval()


@torch.no_grad()
def state(model: PeftModel, held_out: list[dict[str, list[int]]], device: torch.device) -> dict[str, float]:
    reference = copy.deepcopy(model).unload().eval()
    with autocast(device, args.precision):
        loss, match = hinge(model.eval(), reference, next(batches(held_out, SAMPLES, device)))
    return {"held_out_loss": loss.item(), "held_out_match": match.item()}


def main() -> None:
    device = torch.device(args.device)
    rows, rounds = sentences(), []
    for name in args.models:
        for seed in range(args.seeds):
            found = {"model": name, "seed": seed}
            for variant, work in VARIANTS.items():
                model = adapted(name, seed, variant == "ours", device)
                before = state(model, rows[SAMPLES:], device)
                start = time.perf_counter()
                work(model, rows[:SAMPLES], device)
                seconds = time.perf_counter() - start
                found[variant] = {"seconds": seconds, "before": before, **state(model, rows[SAMPLES:], device)}
            found["speedup"] = found["reference"]["seconds"] / found["ours"]["seconds"]
            rounds.append(found)
            print(json.dumps(found), flush=True)
    speedup = {n: statistics.median(r["speedup"] for r in rounds if r["model"] == n) for n in args.models}
    command = "python benchmarks/nlp_init.py " + " ".join(sys.argv[1:])
    write_json(
        RESULT,
        {
            "command": command.strip(),
            "precision": args.precision,
            "speedup": speedup,
            "environment": environment(args.device),
            "rounds": rounds,
        },
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("tiny-t5", "t5-base"), default=["tiny-t5", "t5-base"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=("bf16", "fp32"))
    args = parser.parse_args()
    args.precision = args.precision or ("bf16" if has_fast_bf16(torch.device(args.device)) else "fp32")
    main()
