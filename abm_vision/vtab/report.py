"""A report of the runs in a folder: tables, figures, and where every number comes from.

Real data and rendered surrogates are reported apart, and no average mixes them. An average over fewer tasks than its
name says is shown with its number of tasks.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import wilcoxon

import vtab_tasks
from abm_vision import plots
from abm_vision.abm.files import write_atomically
from abm_vision.vtab import results
from abm_vision.vtab.comparison import BASELINE, area
from abm_vision.vtab.published import PUBLISHED, Published

FILES = ("report.md", "report.csv", "report.tex", "report.html")
GROUP_TITLES = {"natural": "Natural", "specialized": "Specialized", "structured": "Structured"}
_IDENTITY = ("task", "init", "seed")
# Where a run was made and with how many processes says nothing about what was trained.
_PLACES = ("data_dir", "workers", "source", "weights", "device", "precision", "abm_reference")


@dataclass(frozen=True)
class Cell:
    """Top-1 of one method on one task, over seeds."""

    runs: tuple[dict[str, Any], ...]

    @property
    def values(self) -> np.ndarray:
        """In %, one a seed."""
        return np.array([100 * run["test"]["top1"] for run in self.runs])

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds, None for a single one."""
        return float(self.values.std(ddof=1)) if len(self.runs) > 1 else None

    @property
    def subset(self) -> bool:
        """Whether fewer images than the test split has were counted."""
        return any(run["test"]["count"] < run["test"]["split_size"] for run in self.runs)

    @property
    def files(self) -> list[str]:
        """The result files, relative to the report's folder."""
        return [run["file"] for run in self.runs]

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.1f}{spread}{'†' if self.subset else ''}"


@dataclass(frozen=True)
class Average:
    """A mean over tasks, or what there is of it.

    Args:
        name: `Natural`, `Specialized`, `Structured`, `m19` (over 19 tasks), `m3` (over the three groups' means), or
            `rendered`.
        value: in %, over the tasks that are there; None where there are none, or where a part would mislead.
        std: over seeds, of the mean of each seed.
        there, of: numbers of tasks.
    """

    name: str
    value: float | None
    std: float | None
    there: int
    of: int

    def __str__(self) -> str:
        if self.value is None:
            return f"– ({self.there} of {self.of})"
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.value:.1f}{spread}" + ("" if self.there == self.of else f" ({self.there} of {self.of})")


@dataclass(frozen=True)
class Paired:
    """One method against the baseline, paired over tasks: differences of top-1 in points.

    `p` is of the two-sided Wilcoxon signed-rank test over tasks, None with fewer than two that differ.
    """

    method: str
    baseline: str
    tasks: int
    better: int
    worse: int
    difference: float
    area_ratio: float
    p: float | None


@dataclass(frozen=True)
class Section:
    """All that was run on one kind of data, `real` or `rendered`."""

    kind: str
    cells: dict[tuple[str, str], Cell]

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(name for name in vtab_tasks.TASKS if any(task == name for task, _ in self.cells))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """The baseline first."""
        found = dict.fromkeys(method for _, method in self.cells)
        return tuple(sorted(found, key=lambda m: (not m.startswith(BASELINE), m)))

    @property
    def title(self) -> str:
        if self.kind == "real":
            return "VTAB-1K, test top-1 in %"
        return "Rendered surrogates (not VTAB-1K), test top-1 in %"

    def averages(self, method: str) -> list[Average]:
        """Groups and both means for real data; one mean for rendered."""
        if self.kind == "rendered":
            drawable = [t.name for t in vtab_tasks.TASKS.values() if t.group == "structured"]
            return [self._average("rendered", drawable, method)]
        groups = [
            self._average(title, [t.name for t in vtab_tasks.TASKS.values() if t.group == group], method)
            for group, title in GROUP_TITLES.items()
        ]
        whole = self._average("m19", list(vtab_tasks.TASKS), method)
        complete = whole.there == whole.of
        values = [g.value for g in groups]
        m3 = Average("m3", float(np.mean(values)) if complete else None, None, whole.there, whole.of)
        return [*groups, whole if complete else Average("m19", None, None, whole.there, whole.of), m3]

    def missing(self, method: str) -> list[str]:
        """Tasks that the averages lack."""
        wanted = [t.name for t in vtab_tasks.TASKS.values() if self.kind == "real" or t.group == "structured"]
        return [task for task in wanted if (task, method) not in self.cells]

    def _average(self, name: str, tasks: Sequence[str], method: str) -> Average:
        cells = [self.cells[task, method] for task in tasks if (task, method) in self.cells]
        if not cells:
            return Average(name, None, None, 0, len(tasks))
        seeds = [{run["config"]["seed"] for run in cell.runs} for cell in cells]
        std = None
        if all(s == seeds[0] for s in seeds) and len(seeds[0]) > 1:
            std = float(np.mean([cell.values for cell in cells], axis=0).std(ddof=1))
        return Average(name, float(np.mean([cell.mean for cell in cells])), std, len(cells), len(tasks))

    def paired(self) -> list[Paired]:
        """Every method against the baseline, over the tasks and seeds that both have."""
        if not self.methods:
            return []
        baseline = self.methods[0]
        return [p for method in self.methods[1:] if (p := self._paired(method, baseline)) is not None]

    def _paired(self, method: str, baseline: str) -> Paired | None:
        gains, ratios = [], []
        for task in self.tasks:
            ours, theirs = self.cells.get((task, method)), self.cells.get((task, baseline))
            if ours is None or theirs is None:
                continue
            by_seed = [{run["config"]["seed"]: run for run in cell.runs} for cell in (ours, theirs)]
            seeds = sorted(set(by_seed[0]) & set(by_seed[1]))
            if seeds:
                pairs = [(by_seed[0][s], by_seed[1][s]) for s in seeds]
                gains.append(100 * np.mean([a["test"]["top1"] - b["test"]["top1"] for a, b in pairs]))
                ratios.append(np.mean([area(a) / area(b) for a, b in pairs]))
        if not gains:
            return None
        gain = np.array(gains)
        p = float(wilcoxon(gain).pvalue) if np.count_nonzero(gain) > 1 else None
        return Paired(
            method, baseline, len(gain), int((gain > 0).sum()), int((gain < 0).sum()), float(gain.mean()),
            float(np.mean(ratios)), p,
        )  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What a folder of runs holds.

    Args:
        sections: real data first; only those that there are.
        settings: what all runs have in common.
        differing: setting to {value: run files}, for what they have not.
        unfinished: (run folder, why it has no result).
        runs: every result, in the order of task, method and seed.
    """

    sections: tuple[Section, ...]
    settings: dict[str, Any]
    differing: dict[str, dict[str, list[str]]]
    unfinished: tuple[tuple[str, str], ...]
    runs: tuple[dict[str, Any], ...]


def collect(folder: str | Path) -> Report:
    """Read the finished runs below a folder. Runs of a selection, scored on val200, are left out.

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: a result is of another schema, or damaged.
    """
    folder = Path(folder)
    runs, unfinished = [], []
    for path in sorted(folder.glob(f"*/{results.CONFIG}")):
        result = results.read_result(path.parent)
        if result is None:
            unfinished.append((path.parent.name, _why(path.parent)))
        elif result["config"]["evaluate"] == "test":
            runs.append({**result, "file": f"{path.parent.name}/{results.RESULT}"})
    if not runs:
        raise FileNotFoundError(f"no finished run below {folder}: give the folder that was --out of the runs")
    names = _methods(runs)
    order = list(vtab_tasks.TASKS)
    runs.sort(key=lambda r: (order.index(r["config"]["task"]), names[r["file"]], r["config"]["seed"]))
    sections = []
    for kind in ("real", "rendered"):
        cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in runs:
            if (_source(run) == "rendered") == (kind == "rendered"):
                cells.setdefault((run["config"]["task"], names[run["file"]]), []).append(run)
        if cells:
            sections.append(Section(kind, {key: Cell(tuple(found)) for key, found in cells.items()}))
    common, differing = _compare_settings(runs)
    return Report(tuple(sections), common, differing, tuple(unfinished), tuple(runs))


def _source(run: dict[str, Any]) -> str:
    return run["data"]["test"]["source"]


def _why(folder: Path) -> str:
    failure = folder / results.FAILURE
    if failure.is_file():
        return json.loads(failure.read_text(encoding="utf-8"))["reason"]
    return "half done" if (folder / results.CHECKPOINT).is_file() else "not begun"


def _methods(runs: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Result file to the method's name: its start, and settings that make two runs of a task and seed different."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        key = (*(run["config"][k] for k in _IDENTITY), _source(run) == "rendered")
        groups.setdefault(key, []).append(run["config"])
    differing = {
        name
        for configs in groups.values()
        for name in configs[0]
        if name not in _PLACES and any(config[name] != configs[0][name] for config in configs)
    }
    return {
        run["file"]: ", ".join(
            [run["config"]["init"], *(f"{name} {run['config'][name]}" for name in sorted(differing))]
        )
        for run in runs
    }


def _facts(run: dict[str, Any]) -> dict[str, Any]:
    """Settings and circumstances that a reader must know to be equal."""
    config = {k: v for k, v in run["config"].items() if k not in (*_IDENTITY, *_PLACES)}
    environment = run["environment"]
    return {
        **config,
        "weights (sha256)": run["weights"]["sha256"],
        "data": _source(run),
        "precision": run["precision"],
        "device": environment["device"],
        "commit": environment["commit"],
    }


def _compare_settings(runs: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, list[str]]]]:
    facts = [_facts(run) for run in runs]
    common, differing = {}, {}
    for name in facts[0]:
        values: dict[str, list[str]] = {}
        for fact, run in zip(facts, runs, strict=True):
            values.setdefault(str(fact[name]), []).append(run["file"])
        if len(values) == 1:
            common[name] = facts[0][name]
        else:
            differing[name] = values
    return common, differing


# ---------------------------------------------------------------------------------------------------------- writing


def write_report(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.md`, `.csv`, `.tex` and `.html`; returns their paths.

    Raises:
        OSError: nothing can be written there.
    """
    makers = (to_markdown, to_csv, to_latex, to_html)
    paths = [Path(folder) / name for name in FILES]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for path, make in zip(paths, makers, strict=True):
        text = make(report)
        write_atomically(path, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))
    return paths


def rows_of(section: Section) -> list[tuple[str, str, list[str]]]:
    """The table's lines: (kind, name, a text for every method); kind is `task` or `mean`."""
    lines = []
    for task in section.tasks:
        cells = (section.cells.get((task, method)) for method in section.methods)
        lines.append(("task", task, ["–" if cell is None else str(cell) for cell in cells]))
    averages = [section.averages(method) for method in section.methods]
    for k, first in enumerate(averages[0]):
        lines.append(("mean", _average_title(first), [str(found[k]) for found in averages]))
    return lines


def _average_title(average: Average) -> str:
    return {"m19": "m19, mean of the 19 tasks", "m3": "m3, mean of the 3 groups",
            "rendered": "mean of the rendered tasks"}.get(average.name, f"{average.name}, mean")  # fmt: skip


def notes(report: Report) -> list[str]:
    """What a reader of the tables must know."""
    lines = ["± is the standard deviation over seeds. Every run is scored after its last epoch."]
    if any(cell.subset for section in report.sections for cell in section.cells.values()):
        lines.append("† fewer images than the test split has, drawn with a fixed seed; see the list of runs.")
    for section in report.sections:
        if section.kind == "rendered":
            lines.append(
                "Rendered data are drawn by this package. They are not VTAB-1K and compare with no published row."
            )
        lacking: dict[str, list[str]] = {}
        for method in section.methods:
            lacking.setdefault(", ".join(section.missing(method)), []).append(method)
        lines += [f"{section.kind}, {', '.join(m)}: without {tasks}." for tasks, m in lacking.items() if tasks]
    lines += [f"No result: {name} ({why})." for name, why in report.unfinished]
    return lines


def to_markdown(report: Report) -> str:
    """All tables, without figures."""
    parts = ["# Report"]
    for section in report.sections:
        lines = [["task", *section.methods], ["---"] * (1 + len(section.methods))]
        for kind, name, cells in rows_of(section):
            strong = "**" if kind == "mean" else ""
            lines.append([f"{strong}{name}{strong}", *cells])
        parts.append(f"## {section.title}\n\n{_pipe(lines)}")
        if paired := section.paired():
            head = ["start", "tasks", "better", "worse", "mean difference (points)", "training loss area", "p"]
            lines = [head, ["---"] * len(head), *(_paired_cells(p) for p in paired)]
            parts.append(f"Against {paired[0].baseline}, paired over tasks:\n\n{_pipe(lines)}")
    parts.append("\n".join(f"- {line}" for line in notes(report)))
    if any(section.kind == "real" for section in report.sections):
        head = ["published", "Natural", "Specialized", "Structured", "m19", "m3"]
        lines = [head, ["---"] * len(head), *([row.method, *published_means(row)] for row in PUBLISHED)]
        parts.append(f"## Published, ViT-B/16 in21k\n\n{_pipe(lines)}\n\n{published_note()}")
    parts.append("## Settings\n\n" + "\n".join(f"- {name}: {value}" for name, value in report.settings.items()))
    if report.differing:
        lines = [
            f"- {name}: " + "; ".join(f"{value} ({len(files)} runs)" for value, files in values.items())
            for name, values in report.differing.items()
        ]
        parts.append("Settings that differ between runs:\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _pipe(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _paired_cells(paired: Paired) -> list[str]:
    p = "–" if paired.p is None else f"{paired.p:.3f}"
    counts = [str(paired.tasks), str(paired.better), str(paired.worse)]
    return [paired.method, *counts, f"{paired.difference:+.2f}", f"{paired.area_ratio:.2f}", p]


def published_means(row: Published) -> list[str]:
    """N, S, T, m19 and m3 of a published row, computed from its tasks."""
    groups = [
        np.mean([row.top1[task.name] for task in vtab_tasks.TASKS.values() if task.group == group])
        for group in vtab_tasks.GROUPS
    ]
    return [f"{value:.1f}" for value in (*groups, np.mean(list(row.top1.values())), np.mean(groups))]


def published_note() -> str:
    """How the published protocols differ."""
    by_note: dict[str, list[str]] = {}
    for row in PUBLISHED:
        by_note.setdefault(row.note, []).append(row.method)
    return "Protocols: " + "; ".join(f"{', '.join(methods)}: {note}" for note, methods in by_note.items()) + "."


def to_csv(report: Report) -> str:
    """One line a run, with its file."""
    stream = io.StringIO()
    names = _methods(report.runs)
    head = "task group method init lr seed source top1 correct count split_size loss_area information_loss seconds file"
    writer = csv.DictWriter(stream, head.split(), lineterminator="\n")
    writer.writeheader()
    for run in report.runs:
        lost, config, test = run["information_loss"], run["config"], run["test"]
        writer.writerow(
            {
                "task": config["task"],
                "group": vtab_tasks.get_task(config["task"]).group,
                "method": names[run["file"]],
                **{k: config[k] for k in ("init", "lr", "seed")},
                "source": _source(run),
                **{k: test[k] for k in ("top1", "correct", "count", "split_size")},
                "loss_area": round(area(run), 5),
                "information_loss": lost["after"]["overall"]["loss"] if lost else "",
                "seconds": round(sum(run["seconds"].values()), 1),
                "file": run["file"],
            }
        )
    return stream.getvalue()


def to_latex(report: Report) -> str:
    """A booktabs table a section."""
    parts = []
    for section in report.sections:
        body, last = [], "task"
        for kind, name, cells in rows_of(section):
            if kind != last:
                body.append(r"\midrule")
            last = kind
            body.append(" & ".join([_tex(name), *map(_tex, cells)]) + r" \\")
        columns = "l" + "r" * len(section.methods)
        head = " & ".join(["task", *map(_tex, section.methods)])
        above = [f"% {section.title}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", rf"{head} \\", r"\midrule"]
        parts.append("\n".join([*above, *body, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join([*parts, *(f"% {line}" for line in notes(report))]) + "\n"


def _tex(text: str) -> str:
    for character, escaped in (("_", r"\_"), ("%", r"\%"), ("±", r"$\pm$"), ("†", r"$^\dagger$"), ("–", "--")):
        text = text.replace(character, escaped)
    return text


def to_html(report: Report) -> str:
    """One page that needs nothing else: styles, script and figures are inside."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {
            "section": section,
            "rows": rows_of(section),
            "paired": [(_paired_cells(p), p.baseline) for p in section.paired()],
            "figures": [(title, _image(figure)) for title, figure in _figures(section)],
        }
        for section in report.sections
    ]
    return environment.get_template("report.html.jinja").render(
        report=report,
        sections=sections,
        notes=notes(report),
        names=_methods(report.runs),
        groups={task.name: task.group for task in vtab_tasks.TASKS.values()},
        published=[(row, published_means(row)) for row in PUBLISHED],
        published_note=published_note(),
        tasks=list(vtab_tasks.TASKS),
    )


def _figures(section: Section) -> Iterable[tuple[str, Figure]]:
    yield "Test top-1 by task", plots.draw_tasks(section)
    yield "Training loss by epoch", plots.draw_convergence(section)
    if figure := plots.draw_lost(section):
        yield "Information loss by depth and kind of layer, mean over runs", figure


def _image(figure: Figure) -> str:
    """A data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
