"""Initialisations of LoRA on the tiny language models: GLUE's made-up SST-2 and RTE, and made-up instructions.

    python benchmarks/nlp_initializers.py [--threads 1]

Every initialisation with every learning rate (RTE: one) and seed, through the `run` of the real commands. tiny-t5 and
tiny-llama are stand-ins that were pretrained here for minutes, on data that is no benchmark: the numbers compare
initialisations on real tokenisation and trainers, and say nothing about T5 or LLaMA. Finished runs are lines of
`results/nlp_initializers-SUBJECT.jsonl`.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from ledger import Ledger

from nlp_ext.glue import run as run_glue
from nlp_ext.glue.config import GlueConfig
from nlp_ext.instruct import run as run_instruct
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.quiet import only_our_own_words

INITS = ("kaiming", "eva", "abm", "abm_aligned")
RATES = {"sst2": (2e-3, 5e-3), "rte": (5e-3,), "instruct": (2e-3, 5e-3)}
SEEDS = 3
EPOCHS = {"sst2": 3, "rte": 3, "instruct": 1}  # enough for every initialisation to learn these
KEPT = ("config", "scores", "perplexity", "loss_per_step", "seconds", "tiny", "precision", "environment")


def measured(subject: str, init: str, lr: float, seed: int) -> dict[str, Any]:
    """Run once, and return settings, scores, losses and seconds."""
    with tempfile.TemporaryDirectory() as out, only_our_own_words():
        if subject == "instruct":
            config = InstructConfig.make(init=init, lr=lr, seed=seed, epochs=EPOCHS[subject])
            result = run_instruct(config, out)
        else:
            result = run_glue(GlueConfig.make(task=subject, init=init, lr=lr, seed=seed, epochs=EPOCHS[subject]), out)
    return {key: result[key] for key in KEPT if key in result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=list(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--threads", type=int, help="of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    for subject in options.subjects:
        ledger = Ledger(f"nlp_initializers-{subject}")
        done = {(r["config"]["init"], r["config"]["lr"], r["config"]["seed"]) for r in ledger.records}
        for seed in range(SEEDS):
            for init in INITS:
                for lr in RATES[subject]:
                    if (init, lr, seed) not in done:
                        record = measured(subject, init, lr, seed)
                        ledger.append(record)
                        print(subject, init, lr, seed, record.get("scores") or record.get("perplexity"), flush=True)


if __name__ == "__main__":
    main()
