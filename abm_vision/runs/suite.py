"""A suite: runs over tasks, initialisations and seeds, and how far they are. No torch is loaded.

Protocol (that of VTAB-1K, Zhai et al., arXiv:1910.04867): if settings are to be chosen, every combination of a stated
grid, the same for every task, is trained and scored on a part of the training data. The best is trained again on all of
them and scored once, after its last epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from abm_vision.abm.arguments import are
from abm_vision.runs.folder import State
from abm_vision.runs.settings import AdapterSettings
from abm_vision.runs.view import View

if TYPE_CHECKING:
    from abm_vision.runs.harness import Harness

SELECTION_SEED = 0


@dataclass(frozen=True)
class Suite:
    """What is to be run.

    Args:
        view: of which harness.
        tasks, inits: names.
        seeds: seeds 0, ..., seeds - 1 of every final run.
        settings: of all runs, as for the harness's configuration.
        grid: setting to the values that selection chooses from; empty: no selection.
        rates: learning rates that every final run is made with; empty: that of the settings.

    Raises:
        ValueError: a name is unknown or given twice, no seed, a grid where nothing can be selected on, or one over what
            the suite itself sets.
    """

    view: View
    tasks: tuple[str, ...]
    inits: tuple[str, ...]
    seeds: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rates = [("lr", self.rates)] if self.rates else []
        for name, values in (("task", self.tasks), ("init", self.inits), *rates, *self.grid.items()):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} is {', '.join(map(str, values)) or 'empty'}; give one or more, each once")
        if self.seeds < 1:
            raise ValueError(f"seeds is {self.seeds}; it must be 1 or more")
        if self.grid and not self.view.selection.settings:
            raise ValueError(
                f"{self.view.name} has no samples to choose settings on but those that are scored at the end: leave "
                "--grid out"
            )
        if taken := sorted(set(self.view.set_by_suite) & {*self.settings, *self.grid}):
            raise ValueError(f"the suite itself sets {', '.join(taken)}: leave them out of settings and grid")
        if both := sorted(set(self.grid) & set(self.settings)):
            raise ValueError(f"{are(both)} set and to be selected: give each once")
        self.view.config.check_used({*self.settings, *self.grid}, self.inits)
        self.final()  # checks the settings

    def selection(self) -> list[AdapterSettings]:
        """The runs that settings are chosen by; none without a grid."""
        if not self.grid:
            return []
        runs = (
            self._config(task, init, SELECTION_SEED, {**point, **self.view.selection.settings})
            for task, init in itertools.product(self.tasks, self.inits)
            for point in self._points()
        )
        return list(dict.fromkeys(runs))  # points that differ in what an initialisation has no use for are one run

    def final(self, chosen: Mapping[tuple[str, str], Mapping[str, Any]] | None = None) -> list[AdapterSettings]:
        """The runs that are results, with the settings chosen for each (task, initialisation).

        Those for which nothing was chosen are left out. Before anything is, all are there with the grid's first point.
        """
        if chosen is None:
            chosen = dict.fromkeys(itertools.product(self.tasks, self.inits), next(self._points()))
        rates = [{"lr": rate} for rate in self.rates] or [{}]
        return [
            self._config(task, init, seed, {**chosen[task, init], **rate})
            for task, init, rate, seed in itertools.product(self.tasks, self.inits, rates, range(self.seeds))
            if (task, init) in chosen
        ]

    def smoke(self) -> Suite:
        """The same to see whether its runs can be made: one step each, with one seed and one value of what varies."""
        short = self.view.smoke
        return replace(
            self,
            view=replace(self.view, harness=short.harness or self.view.harness),
            seeds=1,
            settings={**self.settings, **short.settings},
            grid={name: values[:1] for name, values in self.grid.items() if name not in short.settings},
            rates=self.rates[:1],
        )

    @cached_property
    def harness(self) -> Harness:
        """The harness, loaded."""
        return resolve_name(self.view.harness)

    def estimate(self, out: str | Path) -> tuple[Callable[[AdapterSettings], float] | None, str]:
        """A function to the seconds that a run is likely to take, None if nothing is known; and in words why."""
        if not self.view.estimate:
            return None, "how long they take is not known before"
        return resolve_name(self.view.estimate)(self.final()[0], out)

    def _points(self) -> Iterator[dict[str, Any]]:
        for values in itertools.product(*self.grid.values()):
            yield dict(zip(self.grid, values, strict=True))

    def _config(self, task: str, init: str, seed: int, point: Mapping[str, Any]) -> AdapterSettings:
        config = self.view.config
        settings = {k: v for k, v in {**self.settings, **point}.items() if config.uses(init, k)}
        return config.make(**settings, **_of_task(config, task), init=init, seed=seed)


def _of_task(config: type[AdapterSettings], task: str) -> dict[str, str]:
    """A harness of a single task has no setting for it."""
    return {"task": task} if "task" in config.plain() else {}


def parse_tasks(text: str, view: View) -> tuple[str, ...]:
    """`all`, groups and tasks with commas between, in their order.

    Raises:
        ValueError: a name is neither a group nor a task.
    """
    wanted: set[str] = set()
    for word in text.split(","):
        if word in ("all", *view.groups.values()):
            wanted |= {task for task in view.tasks if word in ("all", view.groups.get(task))}
        else:
            wanted.add(view.config.make(**_of_task(view.config, word)).subject)
    return tuple(task for task in view.tasks if task in wanted)


@dataclass(frozen=True)
class Planned:
    """One run of a plan: how far it is, and why its result is no good."""

    config: AdapterSettings
    state: str
    reason: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether it would not be run."""
        return self.state in ("finished", "not readable", "another harness")


def plan(suite: Suite, out: str | Path) -> list[Planned]:
    """What the suite would run, selection first. Final runs stand there with the grid's first point."""
    configs = (*suite.selection(), *suite.final())
    return [_planned(config, suite.view.kept.state(Path(out) / config.run_name())) for config in configs]


def _planned(config: AdapterSettings, state: State) -> Planned:
    words = {"not begun": "to run", "failed": "failed before"}
    return Planned(config, words.get(state.name, state.name), "" if state.name == "failed" else state.reason)
