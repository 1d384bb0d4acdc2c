"""Torch's fused attention kernel against timm's plain one, in a training step on CPU.

    python benchmarks/attention.py

timm takes the fused kernel wherever torch has one. In bfloat16 its backward pass on CPU is slow, so that the harness
uses the plain one there (`abm_vision.images.train.choose_attention`). Both take turns in one process; reported is the
median over rounds of fused / plain: above 1, plain is faster.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from training_step import build, stepper, timed

from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "attention.json"
MODEL, ROUNDS = "vit_small_patch14_dinov2", 7


def ratio(size: int, batch: int, dtype: torch.dtype) -> dict[str, float]:
    model = build("ours", MODEL, size, "cpu")
    step = stepper(model, size, batch, dtype, "cpu")
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for round_ in range(ROUNDS + 1):
        for fused in seconds:
            for block in model.get_base_model().blocks:
                block.attn.fused_attn = fused
            taken = timed(step, "cpu")
            if round_:  # one round of warm-up
                seconds[fused].append(taken)
    ratios = [f / p for f, p in zip(seconds[True], seconds[False], strict=True)]
    return {
        "fused_seconds": statistics.median(seconds[True]),
        "plain_seconds": statistics.median(seconds[False]),
        "fused_over_plain": statistics.median(ratios),
        "fused_over_plain_min_max": [min(ratios), max(ratios)],
    }


def main() -> None:
    rows = []
    for size, batch in ((70, 64), (112, 32), (224, 16)):
        for dtype in (torch.bfloat16, torch.float32):
            rows.append({"image_size": size, "batch": batch, "dtype": str(dtype), **ratio(size, batch, dtype)})
            print(rows[-1], flush=True)
    content = {"command": "python benchmarks/attention.py", "model": MODEL, "rounds": ROUNDS}
    RESULT.parent.mkdir(exist_ok=True)
    write_json(RESULT, {**content, "environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
