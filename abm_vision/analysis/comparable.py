"""Runs that may be compared: what must be equal for a difference to be the initialisation's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abm_vision.analysis.load import data_content, settings_in_use
from abm_vision.initializers import BASELINE
from abm_vision.runs.view import Result, View


def common_settings(results: Sequence[Result], view: View) -> dict[str, Any]:
    """The settings that all runs have in common.

    They may differ in task, initialisation, learning rate and seed, and in settings of the initialisation alone.

    Raises:
        ValueError: they differ in more; the message names it. Or there is no run.
    """
    if not results:
        raise ValueError("there is nothing to compare: no run has finished")
    for same in dict.fromkeys(map(view.data_of, results)):
        _equal([{**view.sources(r), **data_content(r, view)} for r in results if view.data_of(r) == same])
    for init in dict.fromkeys(result["config"]["init"] for result in results):
        _equal([_code(result) for result in results if result["config"]["init"] == init])
    return _equal([_shared(result, view) for result in results])


def _shared(result: Result, view: View) -> dict[str, Any]:
    """What must be equal for a difference to be the initialisation's."""
    shared = view.config.shared() - {"lr"}
    return {
        **{name: value for name, value in settings_in_use(result, view).items() if name in shared},
        "weights": result["weights"]["sha256"],
        **view.circumstances(result),
        "precision": result["precision"],
        "device": result["environment"]["device"],
    }


def _code(result: Result) -> dict[str, Any]:
    """Of one initialisation: that of its function. The reference that it is given is a setting of its own."""
    init = result["config"]["init"]
    return {f"code of {init}": result["origin"]["initialisation"]} if "origin" in result else {}


def _equal(common: Sequence[dict[str, Any]]) -> dict[str, Any]:
    differing = {
        name: sorted({str(settings[name]) for settings in common})
        for name in common[0]
        if any(settings[name] != common[0][name] for settings in common)
    }
    if differing:
        words = "; ".join(f"{name} ({', '.join(values)})" for name, values in differing.items())
        raise ValueError(
            f"the runs differ in more than task, initialisation, rate and seed: {words}. Compare like with like"
        )
    return common[0]


def check_seeds(groups: Mapping[tuple[str, str], Sequence[Result]]) -> None:
    """Raise a ValueError unless every initialisation of a task has the seeds of the baseline, each once."""
    for (task, init), runs in groups.items():
        if (task, BASELINE) not in groups:
            raise ValueError(f"{task} has no run with init {BASELINE}, which all others are compared with: add it")
        seeds, wanted = ([r["config"]["seed"] for r in found] for found in (runs, groups[task, BASELINE]))
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{init} on {task} has several runs of one seed: their own settings differ")
        if seeds != wanted:
            raise ValueError(f"{init} on {task} has seeds {seeds}, {BASELINE} has {wanted}: differences are paired")
