"""Scores over tasks and seeds: real data and stand-ins apart, and no average shows a part as the whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from abm_vision.analysis.load import OTHER_DATA, Finished
from abm_vision.analysis.stats import deviation, signed_rank_p, training_loss
from abm_vision.initializers import BASELINE
from abm_vision.runs.view import Kind, Mean, Result, View


@dataclass(frozen=True)
class Cell:
    """Scores of one method on one task, over seeds."""

    runs: tuple[Finished, ...]
    view: View

    @property
    def results(self) -> list[Result]:
        return [run.result for run in self.runs]

    @property
    def values(self) -> np.ndarray:
        """One a seed, in the score's unit."""
        return np.array([*map(self.view.score.shown, self.results)])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, None for a single one."""
        return deviation(self.values)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def subset(self) -> bool:
        """Whether fewer samples than the split has were scored."""
        return any(count < whole for count, whole in map(self.view.data.counted, self.results))

    @property
    def files(self) -> list[str]:
        """The result files, relative to the folder of the runs."""
        return [run.file for run in self.runs]

    def __str__(self) -> str:
        return _in_words(self.mean, self.std, self.subset, self.view.score.digits)


def _in_words(value: float, std: float | None, subset: bool, digits: int) -> str:
    spread = "" if std is None else f" ± {std:.{digits}f}"
    return f"{value:.{digits}f}{spread}{'†' if subset else ''}"


@dataclass(frozen=True)
class Average:
    """A mean over tasks, or what there is of it.

    Args:
        mean: which.
        text: what is shown of it.
        value: over the tasks that are there; None where there are none, or where a part would mislead.
        std: over seeds, of the mean of each seed.
        there, of: numbers of tasks.
    """

    mean: Mean
    text: str
    value: float | None
    std: float | None
    there: int
    of: int

    def __str__(self) -> str:
        return self.text if self.there == self.of else f"{self.text} ({self.there} of {self.of})"


@dataclass(frozen=True)
class Paired:
    """One method against the baseline, paired over tasks: mean difference of scores, in their unit.

    `p` is of the two-sided Wilcoxon signed-rank test over tasks, None with fewer than two that differ.
    """

    method: str
    baseline: str
    tasks: int
    better: int
    worse: int
    difference: float
    loss_ratio: float
    p: float | None


@dataclass(frozen=True)
class Section:
    """All that was run on data of one kind."""

    kind: Kind
    view: View
    cells: dict[tuple[str, str], Cell]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in self.view.tasks if any(task == name for task, _ in self.cells))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The baseline first."""
        found = dict.fromkeys(method for _, method in self.cells)
        return tuple(sorted(found, key=lambda m: (not m.startswith(BASELINE), m)))

    @cached_property
    def heads(self) -> dict[str, str]:
        """Each method as the head of a column: with the settings, such as its learning rate, that others have not."""
        runs = {m: [r for (_, method), c in self.cells.items() if method == m for r in c.runs] for m in self.methods}
        shared = sorted(self.view.config.shared() & self._one[self.methods[0]].facts.keys())
        values = {m: {n: sorted({str(r.facts[n]) for r in found}) for n in shared} for m, found in runs.items()}
        differing = [n for n in shared if any(values[m][n] != values[self.methods[0]][n] for m in self.methods)]
        words = {m: [n for n in differing if n not in self._one[m].own] for m in self.methods}
        return {m: ", ".join([m, *(f"{n} {' or '.join(values[m][n])}" for n in words[m])]) for m in self.methods}

    @property
    def title(self) -> str:
        score = self.view.score
        return f"{self.kind.title}, {score.title}{f' in {score.unit}' if score.unit else ''}"

    def averages(self, method: str) -> list[Average]:
        """Every mean of this kind of data."""
        return [self._average(mean, method) for mean in self.kind.means]

    def _average(self, mean: Mean, method: str) -> Average:
        parts = [[self.cells[task, method] for task in part if (task, method) in self.cells] for part in mean.parts]
        found = [cell for part in parts for cell in part]
        there, of = len(found), sum(map(len, mean.parts))
        if not found or (mean.whole and there < of):
            return Average(mean, "–", None, None, there, of)
        value = float(np.mean([np.mean([cell.mean for cell in part]) for part in parts]))
        std = None
        if all(cell.seeds == found[0].seeds for cell in found):
            std = deviation(np.mean([np.mean([cell.values for cell in part], axis=0) for part in parts], axis=0))
        text = _in_words(value, std, any(cell.subset for cell in found), self.view.score.digits)
        return Average(mean, text, value, std, there, of)

    def missing(self, method: str) -> list[str]:
        """Tasks that the averages lack."""
        return [task for task in self.kind.tasks if (task, method) not in self.cells] if self.kind.means else []

    def paired(self) -> list[Paired]:
        """Every method against the baseline of the same settings, over the tasks and seeds that both have."""
        found = ((m, self._baseline(m)) for m in self._others)
        return [p for method, base in found if base is not None and (p := self._paired(method, base)) is not None]

    def differences(self, method: str) -> dict[str, np.ndarray]:
        """Task to scores less the baseline's of the same settings, in their unit: one a seed that both have."""
        score, found = self.view.score, {}
        for task in self.tasks:
            if pairs := self._pairs(task, method, self._baseline(method)):
                found[task] = np.array([score.shown(a) - score.shown(b) for a, b in pairs])
        return found

    def unpaired(self) -> list[str]:
        """The methods that have no baseline of the same settings."""
        return [m for m in self._others if self._baseline(m) is None]

    @cached_property
    def inits(self) -> dict[str, str]:
        """The initialisation of each method."""
        return {method: self._one[method].init for method in self.methods}

    @cached_property
    def _one(self) -> dict[str, Finished]:
        """The first run of each method."""
        return {method: cell.runs[0] for (_, method), cell in reversed(self.cells.items())}

    @property
    def _others(self) -> list[str]:
        """The methods that are no baseline."""
        return [m for m in self.methods if self._one[m].init != BASELINE]

    def _baseline(self, method: str) -> str | None:
        """The one baseline there is; of several that whose settings, where they differ, are the method's."""
        facts = self._one[method].facts
        own = {m: run.own for m, run in self._one.items() if run.init == BASELINE}
        found = [m for m in own if own[m].get(OTHER_DATA) == facts[OTHER_DATA]]
        if len(found) > 1:
            found = [m for m in found if own[m].items() <= facts.items()]
        return found[0] if len(found) == 1 else None

    def _paired(self, method: str, baseline: str) -> Paired | None:
        differences = self.differences(method)
        if not differences:
            return None
        pairs = (self._pairs(task, method, baseline) for task in differences)
        ratios = [np.mean([training_loss(a) / training_loss(b) for a, b in found]) for found in pairs]
        gain = np.array([values.mean() for values in differences.values()])
        better, worse = int((gain > 0).sum()), int((gain < 0).sum())
        if not self.view.score.higher:
            better, worse = worse, better
        p = signed_rank_p(gain)
        return Paired(method, baseline, len(gain), better, worse, float(gain.mean()), float(np.mean(ratios)), p)

    def _pairs(self, task: str, method: str, baseline: str | None) -> list[tuple[Result, Result]]:
        """Results of the same seed; none without a baseline."""
        cells = (self.cells.get((task, name)) for name in (method, baseline))
        ours, theirs = ({run.seed: run.result for run in cell.runs} if cell else {} for cell in cells)
        return [(ours[seed], theirs[seed]) for seed in sorted(set(ours) & set(theirs))]
