"""Seconds of one training step of models made by `get_peft_model` alone, before and after `use_merged_linear`.

    python benchmarks/fast_layer.py [--rounds 5] [--device cuda]

A BERT of base width (768; 4 layers) on 8 sequences of 128 tokens, a LLaMA 2,048 wide (2 layers) on 4 of 512; random
weights, since time does not depend on them. Rank 8, on peft's default targets (query and value) or on every linear
layer. Beside it the frozen model with gradients to its input embeddings, which no adapter can undercut, and full
fine-tuning. Variants take turns as in `training_step.py`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from nlp_step import step_of
from peft import LoraConfig, get_peft_model
from torch import nn
from training_step import take_turns
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from abm_vision import use_merged_linear
from abm_vision.abm.files import write_json
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "fast_layer.json"
BATCHES = {"bert": (8, 128), "llama": (4, 512)}  # sequences, tokens
TARGETS = {"default": None, "all-linear": "all-linear"}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return BertForSequenceClassification(BertConfig(num_hidden_layers=4, vocab_size=1000, **dropout))
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=1000, **shape))


def stepper(name: str, targets: str | None, variant: str, dtype: torch.dtype, device: str) -> Callable[[], None]:
    """Make one step of AdamW; input embeddings require a gradient so that the floor's backward pass is complete."""
    model: nn.Module = build(name)
    embeddings = model.get_input_embeddings()
    if variant == "floor":
        model.requires_grad_(False)
    elif variant != "full":
        task = "SEQ_CLS" if name == "bert" else "CAUSAL_LM"
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=8, target_modules=targets, task_type=task))
    if variant == "ours" and not use_merged_linear(model):
        raise RuntimeError("no layer was changed")
    model = model.train().to(device)
    count, tokens = BATCHES[name]
    ids = torch.randint(3, 250, (count, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    labels = ids[:, 0] % 2 if name == "bert" else ids
    return step_of(model, embeddings(ids), labels, dtype, device, trains=variant != "floor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = []
    for name in BATCHES:
        for dtype in (getattr(torch, d) for d in args.dtypes):
            steps = {v: stepper(name, None, v, dtype, args.device) for v in ("floor", "full")}
            for words, targets in TARGETS.items():
                for variant in ("peft", "ours"):
                    steps[f"{variant}, {words}"] = stepper(name, targets, variant, dtype, args.device)
            measured = take_turns(steps, args.rounds, args.device)
            rows.append({"model": name, "batch": BATCHES[name], "dtype": str(dtype), "variants": measured})
            print(json.dumps(rows[-1], indent=1), flush=True)
    command = "python benchmarks/fast_layer.py " + " ".join(sys.argv[1:])
    write_json(
        args.out,
        {"command": command.strip(), "rounds": args.rounds, "environment": environment(args.device), "rows": rows},
    )


if __name__ == "__main__":
    main()
