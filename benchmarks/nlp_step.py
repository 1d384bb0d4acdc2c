"""Seconds of one training step of T5 and LLaMA: frozen floor, stock peft, ours.

    python benchmarks/nlp_step.py [--rounds 7]

Weights are random, since time does not depend on them: the shape of tiny-t5 and of T5-Base (220 million parameters),
and that of tiny-llama. The floor is the frozen model with gradients flowing to its input embeddings, which no adapter
can undercut. Variants take turns as in `training_step.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from training_step import take_turns
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment
from nlp_ext import add_lora
from nlp_ext.tiny import make_model

RESULT = Path(__file__).parent / "results" / "nlp_step.json"
VARIANTS = ("floor", "peft", "ours")
# Sequences in a batch, tokens of an input, and of a T5 target.
BATCHES = {"tiny-t5": (32, 128, 16), "tiny-llama": (16, 128, 0), "t5-base": (8, 128, 8)}


def build(name: str) -> PreTrainedModel:
    if name != "t5-base":
        return make_model(name)
    torch.manual_seed(0)
    config = T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0, dropout_rate=0.0
    )
    return T5ForConditionalGeneration(config)


def stepper(name: str, variant: str, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Make one step of AdamW; input embeddings require a gradient so that the floor's backward pass is complete."""
    count, tokens, answer = BATCHES[name]
    model: nn.Module = build(name)
    embeddings = model.get_input_embeddings()
    if variant == "floor":
        model.requires_grad_(False)
    else:
        model = add_lora(model, rank=8, merged_linear=variant == "ours")
    model = model.train().to(device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (count, tokens), generator=generator).to(device)
    labels = ids if not answer else torch.randint(3, 250, (count, answer), generator=generator).to(device)
    return step_of(model, embeddings(ids), labels, dtype, device, trains=variant != "floor")


def step_of(
    model: nn.Module, embedded: Tensor, labels: Tensor, dtype: torch.dtype, device: str, trains: bool
) -> Callable[[], None]:
    """Make one step of AdamW on embedded tokens, which require a gradient; without `trains` a backward pass alone."""
    inputs = embedded.detach().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad] or [inputs]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, foreach=True)

    def step() -> None:
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(inputs_embeds=inputs, labels=labels).loss
        loss.backward()
        if trains:
            optimiser.step()
        optimiser.zero_grad()
        inputs.grad = None

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=tuple(BATCHES), default=list(BATCHES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for name in args.models:
        for dtype in (getattr(torch, d) for d in args.dtypes):
            steps = {v: stepper(name, v, dtype, args.device) for v in VARIANTS}
            measured = take_turns(steps, args.rounds, args.device)
            rows.append({"model": name, "batch": BATCHES[name], "dtype": str(dtype), "variants": measured})
            print(json.dumps(rows[-1], indent=1), flush=True)
    command = "python benchmarks/nlp_step.py " + " ".join(sys.argv[1:])
    write_json(
        args.out,
        {"command": command.strip(), "rounds": args.rounds, "environment": environment(args.device), "rows": rows},
    )


if __name__ == "__main__":
    main()
