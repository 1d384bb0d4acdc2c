"""Finished runs that differ in their start alone, and what can be said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from abm_vision.plots import epoch_losses
from abm_vision.runs.content import shortened
from abm_vision.vtab.config import RunConfig

BASELINE = "kaiming"
RESAMPLES = 10_000
# What may differ between compared runs. The learning rate may because each start is taken at its own best.
_OWN = ("task", "init", "lr", "seed")


@dataclass(frozen=True)
class Row:
    """One start on one task, at the learning rate with its lowest mean training loss.

    Intervals are the 2.5 and 97.5 % quantiles of a bootstrap over seeds. A few seeds are few: of three it is the range.

    Args:
        task, source, init, lr: what was run; source is where its images are from.
        seeds: number of runs at that rate.
        area: training loss averaged over all steps, mean over seeds: the area under its curve, in epochs, over
            their number; area_error is the standard error, None for a single seed.
        area_ratio: to the baseline's area, paired by seed, with area_low and area_high by bootstrap over seeds.
        timed_ratio: the same with the start's cost counted: the curve begins with as many epochs at its first value
            as the start took time for, and ends where the baseline's ends. None if the cost is not known.
        top1: final test accuracy in [0, 1], mean over seeds; top1_error is the standard error.
        top1_gain: less the baseline's, paired by seed, with top1_low and top1_high.
        start_epochs: what the start cost, tuned reference included, in training epochs of the same run; None if the
            cost of a given reference is not known.
        epochs_to: epochs until the mean training loss of an epoch is the baseline's last one; None if never.
        timed_epochs_to: the same with the start's cost counted.
        information_loss: after the start, on images that it did not see, mean over seeds; None where not measured.
        seen_loss: the same on images that it saw.
    """

    task: str
    source: str
    init: str
    lr: float
    seeds: int
    area: float
    area_error: float | None
    area_ratio: float
    area_low: float
    area_high: float
    timed_ratio: float | None
    top1: float
    top1_error: float | None
    top1_gain: float
    top1_low: float
    top1_high: float
    start_epochs: float | None
    epochs_to: float | None
    timed_epochs_to: float | None
    information_loss: float | None
    seen_loss: float | None


@dataclass(frozen=True)
class Comparison:
    """Rows by task and then area; for the figure the runs at each start's best rate, and what every rate gave.

    Args:
        rows: the table.
        best: (task, init) to the results of its runs, in the order of seeds.
        rates: (task, init) to {learning rate: (mean area, mean top-1)}, None where a run diverged.
        settings: what all the runs have in common.
    """

    rows: tuple[Row, ...]
    best: Mapping[tuple[str, str], Sequence[dict[str, Any]]]
    rates: Mapping[tuple[str, str], Mapping[float, tuple[float, float] | None]]
    settings: Mapping[str, Any]


def compare(results: Sequence[dict[str, Any]], diverged: Sequence[RunConfig] = ()) -> Comparison:
    """The comparison of finished runs, among them the baseline's (`kaiming`).

    Args:
        results: contents of `result.json`.
        diverged: runs without a result; their start is not taken at their rate.

    Raises:
        ValueError: the runs differ in more than task, start, rate, seed and the start's own settings; the message
            names the fields. Or the baseline is missing, or a start lacks seeds that others have.
    """
    settings = _common_settings(results)
    groups: dict[tuple[str, str], dict[float, list[dict[str, Any]] | None]] = {}
    for result in results:
        config = result["config"]
        rates = groups.setdefault((config["task"], config["init"]), {})
        rates.setdefault(config["lr"], []).append(result)
    for config in diverged:
        groups.setdefault((config.task, config.init), {})[config.lr] = None
    best: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for key, rates in groups.items():
        whole = {lr: runs for lr, runs in rates.items() if runs is not None}
        if not whole:
            raise ValueError(f"{key[1]} on {key[0]} diverged at every learning rate: add a lower one")
        best[key] = sorted(min(whole.values(), key=_mean_area), key=lambda r: r["config"]["seed"])
    _check_seeds(best)
    rows = [_row(runs, _baseline(best, task)) for (task, _), runs in best.items()]
    tasks = list(dict.fromkeys(task for task, _ in best))
    rows.sort(key=lambda row: (tasks.index(row.task), row.area))
    spread = {
        key: {lr: None if runs is None else (_mean_area(runs), _mean_top1(runs)) for lr, runs in sorted(rates.items())}
        for key, rates in groups.items()
    }
    return Comparison(tuple(rows), best, spread, settings)


def _common_settings(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all runs must have in common, and those of one task besides: its data."""
    if not results:
        raise ValueError("there is nothing to compare: no run has finished")
    for task in dict.fromkeys(result["config"]["task"] for result in results):
        _equal([_data(result) for result in results if result["config"]["task"] == task])
    for init in dict.fromkeys(result["config"]["init"] for result in results):
        _equal([_code(result) for result in results if result["config"]["init"] == init])
    return _equal([_settings(result) for result in results])


def _equal(common: Sequence[dict[str, Any]]) -> dict[str, Any]:
    differing = {
        name: sorted({str(settings[name]) for settings in common})
        for name in common[0]
        if any(settings[name] != common[0][name] for settings in common)
    }
    if differing:
        words = "; ".join(f"{name} ({', '.join(values)})" for name, values in differing.items())
        raise ValueError(f"the runs differ in more than task, start, rate and seed: {words}. Compare like with like")
    return common[0]


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a difference to be the start's."""
    config = {k: v for k, v in result["config"].items() if k in RunConfig.shared() - set(_OWN)}
    # What was asked for; what came of it is below, or says nothing about the run.
    for name in ("source", "weights", "precision", "device", "data_dir", "workers"):
        config.pop(name)
    return {
        **config,
        "weights": result["weights"]["sha256"],
        "precision": result["precision"],
        "device": result["environment"]["device"],
    }


def _data(result: dict[str, Any]) -> dict[str, Any]:
    sources = {"training data": result["data"]["train"]["source"], "test data": result["data"]["test"]["source"]}
    return {**sources, **data_content(result)}


def data_content(result: dict[str, Any]) -> dict[str, str]:
    """Hashes of the run's data, in short; none in records that were made before results had any."""
    parts = ("training images", "training labels", "test images", "test labels")
    return {part: shortened(result["origin"][part]) for part in parts if "origin" in result}


def _code(result: dict[str, Any]) -> dict[str, Any]:
    """Of one initialisation: that of its function. The reference that it is given is a setting of its own."""
    init = result["config"]["init"]
    return {f"code of {init}": result["origin"]["initialisation"]} if "origin" in result else {}


def _check_seeds(best: Mapping[tuple[str, str], Sequence[dict[str, Any]]]) -> None:
    for (task, init), runs in best.items():
        seeds = [r["config"]["seed"] for r in runs]
        wanted = [r["config"]["seed"] for r in _baseline(best, task)]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{init} on {task} has several runs of one seed: their own settings differ")
        if seeds != wanted:
            raise ValueError(f"{init} on {task} has seeds {seeds}, {BASELINE} has {wanted}: differences are paired")


def _baseline(best: Mapping[tuple[str, str], Sequence[dict[str, Any]]], task: str) -> Sequence[dict[str, Any]]:
    if (task, BASELINE) not in best:
        raise ValueError(f"{task} has no run with init {BASELINE}, which all others are compared with: add it")
    return best[task, BASELINE]


def _row(runs: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> Row:
    config = runs[0]["config"]
    areas, others = _each(area, runs), _each(area, baseline)
    top1, other_top1 = _each(_top1, runs), _each(_top1, baseline)
    costs = [start_epochs(r) for r in runs]
    cost = None if None in costs else float(np.mean(costs))
    reached = _epochs_to(runs, epoch_losses(baseline).mean(0)[-1])
    ratio_low, ratio_high = bootstrap(areas / others)
    gain_low, gain_high = bootstrap(top1 - other_top1)
    return Row(
        task=config["task"],
        source=runs[0]["data"]["train"]["source"],
        init=config["init"],
        lr=config["lr"],
        seeds=len(runs),
        area=float(areas.mean()),
        area_error=standard_error(areas),
        area_ratio=float((areas / others).mean()),
        area_low=ratio_low,
        area_high=ratio_high,
        timed_ratio=None if cost is None else float((_each(_timed, runs) / _each(_timed, baseline)).mean()),
        top1=float(top1.mean()),
        top1_error=standard_error(top1),
        top1_gain=float((top1 - other_top1).mean()),
        top1_low=gain_low,
        top1_high=gain_high,
        start_epochs=cost,
        epochs_to=reached,
        timed_epochs_to=None if reached is None or cost is None else reached + cost,
        information_loss=_mean_loss(runs, "after"),
        seen_loss=_mean_loss(runs, "after_on_seen"),
    )


def _mean_loss(runs: Sequence[dict[str, Any]], moment: str) -> float | None:
    if not all(run["information_loss"] for run in runs):
        return None
    return float(np.mean([run["information_loss"][moment]["overall"]["loss"] for run in runs]))


def _each(figure: Callable[[dict[str, Any]], float], runs: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([figure(run) for run in runs])


def area(result: dict[str, Any]) -> float:
    """Training loss averaged over all steps: the area under its curve per epoch."""
    return float(np.mean(result["loss_per_step"]))


def timed_area(result: dict[str, Any], cost: float) -> float:
    """The same when training begins `cost` epochs late: the first step's loss until then, and the end cut off."""
    losses = np.array(result["loss_per_step"])
    late = min(len(losses), cost * len(losses) / result["config"]["epochs"])  # steps, a fraction at the end
    whole = len(losses) - int(np.ceil(late))
    rest = len(losses) - late - whole  # of the step that is only partly run
    total = late * losses[0] + losses[:whole].sum() + (rest * losses[whole] if rest else 0.0)
    return float(total / len(losses))


def _timed(result: dict[str, Any]) -> float:
    return timed_area(result, start_epochs(result))


def start_epochs(result: dict[str, Any]) -> float | None:
    """What the start took, its tuned reference included, over the median training epoch of the same run."""
    seconds, reference = result["seconds"], result["reference"]
    if reference and reference["seconds"] is None:
        return None
    return (seconds["init"] + seconds.get("reference", 0.0)) / float(np.median(result["seconds_per_epoch"]))


def _epochs_to(runs: Sequence[dict[str, Any]], target: float) -> float | None:
    """Epochs until the mean over runs of an epoch's loss is at the target, linear between epochs."""
    curve = epoch_losses(runs).mean(0)
    below = np.flatnonzero(curve <= target)
    if not len(below):
        return None
    k = int(below[0])
    if k == 0:
        return 1.0
    return float(k + (curve[k - 1] - target) / (curve[k - 1] - curve[k]))


def _top1(result: dict[str, Any]) -> float:
    return result["test"]["top1"]


def _mean_area(runs: Sequence[dict[str, Any]]) -> float:
    return float(_each(area, runs).mean())


def _mean_top1(runs: Sequence[dict[str, Any]]) -> float:
    return float(_each(_top1, runs).mean())


def standard_error(values: np.ndarray) -> float | None:
    """Of the mean; None for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None


def bootstrap(values: np.ndarray) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the mean of paired differences (or ratios) over resamples of them; seeded."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), [0.025, 0.975])
    return float(low), float(high)
