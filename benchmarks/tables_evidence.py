"""Tables of the evidence on real weights and real data, of whichever size was run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable
from typing import Any

from evidence import SIZES
from ledger import Ledger
from tables_costs import table

from abm_vision.initializers import BASELINE

Run = dict[str, Any]
WORDS = {"kaiming": "`kaiming` (peft's default)", "kaiming_long": "the same, A scaled by 4"}


def cifar10() -> str:
    """List test top-1 by budget, each initialisation at the rate with the best mean validation top-1."""
    parts = []
    for size, subject, runs in _found("cifar10"):
        budgets = sorted({epochs for _, epochs, *_ in runs})
        rows = []
        for init in dict.fromkeys(init for init, *_ in runs):
            cells, costs = [], []
            for epochs in budgets:
                by_rate = _by_rate(runs, init, epochs)
                lr = max(by_rate, key=lambda lr: statistics.mean(_validation(r) for r in by_rate[lr]))
                chosen = by_rate[lr]
                cells.append(f"{_spread([100 * _top1(r) for r in chosen], 1)} ({lr:g})")
                costs += [r["seconds"]["init"] / statistics.median(r["seconds_per_epoch"]) for r in chosen if _top1(r)]
            rows.append([_label(init, runs), *cells, f"{statistics.median(costs):.2f}", _collapse(runs, init)])
        head = ["initialisation", *(f"{epochs} epochs (learning rate)" for epochs in budgets), "its cost (epochs)"]
        head += ["collapses at"]
        default = (
            f"{_spread([100 * _top1(r) for r in found], 1)} at {lr:g} ({epochs} epochs)"
            for epochs in budgets
            for lr, found in _by_rate(runs, BASELINE, epochs).items()
        )
        every = f"`{BASELINE}` at every learning rate: {', '.join(default)}."
        parts.append(f"CIFAR-10, {subject}, size {size}; {_about(runs)}:\n\n{table(head, rows)}\n\n{every}")
    note = (
        "Test top-1 (%), mean and standard deviation over seeds, at the learning rate with the best mean validation "
        "top-1 (the lower one of two that are equal). It collapses at the lowest one whose test top-1 is 10 points "
        "below its best of the same budget."
    )
    return "\n\n".join([*parts, note])


def smollm() -> str:
    """List held-out perplexity, accuracy and information loss, each initialisation at its best rate in training."""
    parts = []
    for size, subject, runs in _found("smollm"):
        everything = [r for several in runs.values() for r in several]
        count = everything[0]["perplexity"]["conversations"]
        before = {r["key"][-1]: r["perplexity"]["before"] for r in everything}  # every seed has other conversations
        rows = [["before training", "-", _spread([*before.values()], 2), "-", "-", "-"]]
        default = {r["key"][-1]: r["perplexity"]["after"] for r in _chosen(runs, BASELINE)}
        for init in dict.fromkeys(init for init, *_ in runs):
            chosen = _chosen(runs, init)
            ratios = [r["perplexity"]["after"] / default[r["key"][-1]] for r in chosen]
            lost = next((r["information_loss"]["after"] for r in everything if _is(r, init) and _lost(r)), None)
            steps = [r["seconds"]["init"] / r["seconds"]["train"] * len(r["loss_per_step"]) for r in chosen]
            rows.append(
                [
                    _label(init, runs),
                    f"{chosen[0]['key'][3]:g}",
                    _spread([r["perplexity"]["after"] for r in chosen], 2),
                    f"{statistics.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
                    "-" if lost is None else f"{lost:.3f}",
                    f"{statistics.median(steps):.0f}",
                ]
            )
            if all("accuracy" in r for r in chosen):
                rows[-1].append(_spread([100 * r["accuracy"] for r in chosen], 1))
        head = ["initialisation", "learning rate", "perplexity", "ratio to the default's, by seed", "information loss"]
        head += ["its cost (training steps)"]
        if len(rows[-1]) > len(head):
            head.append("accuracy (%)")
            before = {r["key"][-1]: 100 * r["accuracy_before"] for r in everything}
            rows[0].append(_spread([*before.values()], 1))
        about = f"{subject}, size {size}; {count} held-out conversations; {_about(runs)}"
        by_rate = _by_rate(runs, BASELINE, 1).items()
        rates = (f"{_spread([r['perplexity']['after'] for r in found], 2)} at {lr:g}" for lr, found in by_rate)
        parts.append(f"{about}:\n\n{table(head, rows)}\n\n`{BASELINE}` at every learning rate: {', '.join(rates)}.")
    note = (
        "SmolLM2-135M-Instruct, dequantised from Q4_1. Perplexity of held-out answers, mean and standard deviation "
        "over seeds, which have conversations of their own, at the learning rate with the lowest training loss in the "
        "last quarter of the steps. Accuracy is that of the first token; untuned, the model begins with other words. "
        "Information loss is of the first seed at 1e-3; that of PiSSA and the last two in runs of their own. "
        "Other work ran beside, so that costs are rough."
    )
    return "\n\n".join([*parts, note])


Key = tuple[str, int, float, int]  # initialisation, epochs, rate, seed


def _found(name: str) -> Iterable[tuple[str, str, dict[Key, list[Run]]]]:
    """Size, subject and runs, of the largest size that was run."""
    for size in SIZES:
        if records := Ledger(f"{name}-{size}").records:
            for subject in dict.fromkeys(r["key"][0] for r in records):
                if runs := _whole({tuple(r["key"][1:]): [r] for r in records if r["key"][0] == subject}):
                    yield size, subject, runs
            return


def _whole(runs: dict[Key, list[Run]]) -> dict[Key, list[Run]]:
    """The runs of the seeds that an initialisation has made at every budget and rate."""
    wanted = {(epochs, lr) for _, epochs, lr, _ in runs}
    made = Counter((init, seed) for init, _, _, seed in runs)
    return {key: found for key, found in runs.items() if made[key[0], key[3]] == len(wanted)}


def _label(init: str, runs: dict[Key, list[Run]]) -> str:
    """Its name, and the number of its seeds where others have more."""
    seeds = {i: len({seed for j, *_, seed in runs if j == i}) for i, *_ in runs}
    few = f", {seeds[init]} seed{'s' * (seeds[init] > 1)}" if seeds[init] < max(seeds.values()) else ""
    return WORDS.get(init, f"`{init}`") + few


def _by_rate(runs: dict[Key, list[Run]], init: str, epochs: int) -> dict[float, list[Run]]:
    """The runs of every rate, all seeds; those that diverged among them."""
    rates = sorted({lr for i, e, lr, _ in runs if (i, e) == (init, epochs)})
    return {lr: [r for (i, e, rate, _), (r,) in runs.items() if (i, e, rate) == (init, epochs, lr)] for lr in rates}


def _chosen(runs: dict[Key, list[Run]], init: str) -> list[Run]:
    """The runs of text at the rate with the lowest training loss in the last quarter of the steps."""
    by_rate = _by_rate(runs, init, 1)
    return by_rate[min(by_rate, key=lambda lr: statistics.mean(_late(r) for r in by_rate[lr]))]


def _top1(run: Run) -> float:
    return run["test"]["top1"] if run.get("test") else 0.0


def _validation(run: Run) -> float:
    """Of the epoch that was kept; VTAB's runs keep the last, and have no other than the test."""
    if run["diverged"]:
        return 0.0
    return run["validation"]["top1"] if run.get("validation") else -statistics.mean(run["loss_per_step"])


def _late(run: Run) -> float:
    losses = run.get("loss_per_step", [float("inf")])
    return statistics.mean(losses[-max(1, len(losses) // 4) :])


def _collapse(runs: dict[Key, list[Run]], init: str) -> str:
    """The lowest rate, of any budget, at which the mean test top-1 is 10 points below the budget's best."""
    fallen = []
    for epochs in {e for i, e, *_ in runs if i == init}:
        means = {lr: statistics.mean(map(_top1, found)) for lr, found in _by_rate(runs, init, epochs).items()}
        fallen += [lr for lr, mean in means.items() if mean < max(means.values()) - 0.1]
    return f"{min(fallen):g}" if fallen else "none tried"


def _is(run: Run, init: str) -> bool:
    return run["key"][1] == init


def _lost(run: Run) -> bool:
    return bool(run.get("information_loss"))


def _about(runs: dict[Key, list[Run]]) -> str:
    """Learning rates, seeds, devices, and the hours of all runs added up."""
    rates = ", ".join(f"{lr:g}" for lr in sorted({lr for _, _, lr, _ in runs}))
    seeds = len({seed for *_, seed in runs})
    devices = dict.fromkeys(r["environment"]["device"] for (r,) in runs.values() if not r["diverged"])
    hours = sum(sum(r["seconds"].values()) for (r,) in runs.values()) / 3600
    return f"learning rates {rates}; {seeds} seed{'s' * (seeds > 1)}; {hours:.1f} h in all; {', '.join(devices)}"


def _spread(values: list[float], digits: int, spread: bool = True) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if spread and len(values) > 1 else text
