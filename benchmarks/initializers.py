"""Every initialisation of LoRA against peft's default: information loss, training speed, test accuracy.

    python benchmarks/initializers.py --task dsprites_loc            # screen, then confirm; resumes if interrupted
    python benchmarks/initializers.py --task dsprites_loc --list     # how much is done

Rendered data, DINOv2 ViT-S/14 at 70 px. `screen`: every initialisation at every learning rate, one
seed, 4 epochs. `confirm`: 12 epochs, 3 seeds, for the default, ours, and the one other that did best in the
screening, each at the rate that had the lowest mean training loss there; then with a tuned reference; then the default
at the rates beside its own, so that its rate is not one that suits 4 epochs alone. Every run is one line of
`results/initializers-TASK.jsonl`, and is not repeated.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from ledger import Ledger, parse

from abm_vision.initializers import INITIALIZERS, Needs
from abm_vision.runs.folder import Diverged
from abm_vision.vtab import RunConfig, make_config, run

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)
ALWAYS = ("kaiming", "abm_aligned", "abm")
BASELINE = "kaiming"
# For boundary matching. `settings_sweep.py` has since found fewer and smaller steps no worse, and cheaper.
MATCHING = {"abm_lr": 3e-3, "abm_steps": 50, "abm_batch_size": 16}
SCREEN = {"epochs": 4, "warmup": 1 / 4, "test_images": 1000}
WHOLE = {"epochs": 12, "warmup": 1 / 12, "test_images": 5000}
# A tuned reference costs a whole run each time: it is confirmed, not screened, at the default's rate.
# pissa_niter_16 is PiSSA with another decomposition of the same matrix.
SCREENED = tuple(n for n, s in INITIALIZERS.items() if Needs.REFERENCE not in s.needs and n != "pissa_niter_16")


def has(ledger: Ledger, stage: str, config: RunConfig) -> bool:
    return any((r["stage"], _settings(r["config"])) == (stage, _settings(config.to_dict())) for r in ledger.records)


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that determine a run: a record without one had its default; some have no effect."""
    known = {**RunConfig().to_dict(), **config}
    if "warmup_epochs" in config:  # as the oldest records have it
        known["warmup"] = known.pop("warmup_epochs") / config["epochs"]
    return {name: value for name, value in known.items() if RunConfig.uses(config["init"], name)}


def run_once(ledger: Ledger, stage: str, config: RunConfig, diagnose: bool = False) -> None:
    """Run a configuration without a record; a run whose loss diverges is recorded as such."""
    if has(ledger, stage, config):
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            record = slim(run(config, folder, diagnose=diagnose))
        except Diverged as error:
            record = {"config": config.to_dict(), "diverged": str(error)}
    ledger.append({"stage": stage, **record})
    loss = statistics.mean(record.get("loss_per_step", [float("nan")]))
    top1 = record.get("test", {}).get("top1", float("nan"))
    print(
        f"{stage} {config.init} lr {config.lr:g} seed {config.seed}: mean training loss {loss:.3f}, "
        f"top-1 {100 * top1:.1f} %, {time.perf_counter() - began:.0f} s",
        flush=True,
    )


def matching(init: str) -> dict[str, Any]:
    return MATCHING if RunConfig.uses(init, "abm_steps") else {}


def screening(task: str) -> Iterator[RunConfig]:
    # The most informative ones first, as the work may be cut short.
    order = sorted(SCREENED, key=lambda name: ALWAYS.index(name) if name in ALWAYS else len(ALWAYS))
    for init, lr in itertools.product(order, RATES):
        yield make_config(task=task, init=init, lr=lr, **matching(init), **SCREEN)


def best_rates(records: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Map an initialisation to (lowest mean training loss of the screening, its rate)."""
    lowest: dict[str, tuple[float, float]] = {}
    for record in records:
        if record["stage"] == "screen" and "loss_per_step" in record:
            config, loss = record["config"], statistics.mean(record["loss_per_step"])
            lowest[config["init"]] = min(lowest.get(config["init"], (loss, config["lr"])), (loss, config["lr"]))
    return lowest


def confirming(task: str, records: list[dict[str, Any]]) -> Iterator[RunConfig]:
    best = best_rates(records)
    if not set(ALWAYS) <= set(best):
        return  # the screening is not finished
    peers = sorted((loss, init) for init, (loss, _) in best.items() if init not in ALWAYS)
    for seed, init in itertools.product(SEEDS, (*ALWAYS, *(init for _, init in peers[:1]))):
        yield make_config(task=task, init=init, lr=best[init][1], seed=seed, **matching(init), **WHOLE)
    for seed in SEEDS:
        yield make_config(task=task, init="abm_tuned", lr=best[BASELINE][1], seed=seed, **MATCHING, **WHOLE)
    place = RATES.index(best[BASELINE][1])
    for seed, lr in itertools.product(SEEDS, RATES[max(0, place - 1) : place + 2]):
        yield make_config(task=task, init=BASELINE, lr=lr, seed=seed, **WHOLE)


def slim(result: dict[str, Any]) -> dict[str, Any]:
    """Keep what `compare` needs of a result."""
    lost = result["information_loss"]
    return {
        "config": result["config"],
        "test": result["test"],
        "data": {split: {"source": result["data"][split]["source"]} for split in ("train", "test")},
        "weights": {"sha256": result["weights"]["sha256"]},
        "precision": result["precision"],
        "environment": result["environment"],
        "loss_per_step": [round(value, 5) for value in result["loss_per_step"]],
        "seconds": {name: round(value, 3) for name, value in result["seconds"].items()},
        "seconds_per_epoch": [round(value, 3) for value in result["seconds_per_epoch"]],
        "top1_per_epoch": result["top1_per_epoch"],
        "reference": result["reference"],
        "match": result["abm"]["after"]["match"] if result["abm"] else None,
        "information_loss": lost and {moment: {"overall": report["overall"]} for moment, report in lost.items()},
    }


def main() -> None:
    options = parse(__doc__, "--list")
    ledger = Ledger(f"initializers-{options.task}")
    if options.list:
        confirmed = confirming(options.task, ledger.records)
        for stage, wanted in (("screen", screening(options.task)), ("confirm", confirmed)):
            done = [has(ledger, stage, config) for config in wanted]
            print(f"{stage}: {sum(done)} of {len(done)} runs")
        return
    for config in screening(options.task):
        # The information loss of an initialisation does not depend on the learning rate.
        run_once(ledger, "screen", config, diagnose=config.lr == RATES[0])
    for config in confirming(options.task, ledger.records):
        run_once(ledger, "confirm", config)


if __name__ == "__main__":
    main()
