"""A report of the runs in a folder: tables, figures, and where every number comes from."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from abm_vision.abm.files import write_atomically
from abm_vision.analysis.load import BASELINE, compare_facts, find
from abm_vision.analysis.sections import Cell, Paired, Section
from abm_vision.analysis.stats import training_loss
from abm_vision.analysis.tables import csv_table, latex_table, markdown_table
from abm_vision.analysis.view import Mean, Published, Result, View
from abm_vision.runs.markup import markdown, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("report.md", "report.csv", "report.tex", "report.html")


@dataclass(frozen=True)
class Report:
    """What a folder of runs holds.

    Args:
        folder: which.
        view: the harness's.
        sections: real data first; only those that there are.
        settings: what all runs have in common.
        differing: setting to {value: run files}, for what they have not.
        unfinished: (run folder, why it has no result).
        runs: every result by task, method and seed, with its `method`, and its `file` relative to the folder.
    """

    folder: Path
    view: View
    sections: tuple[Section, ...]
    settings: dict[str, Any]
    differing: dict[str, dict[str, list[str]]]
    unfinished: tuple[tuple[str, str], ...]
    runs: tuple[Result, ...]


def collect(folder: str | Path, view: View) -> Report:
    """Read the finished runs below a folder. Runs of a selection are left out.

    A result that cannot be read is named among what has none, with the reason.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    runs, unfinished = find(Path(folder), view)
    sections = []
    for kind in view.kinds:
        cells: dict[tuple[str, str], list[Result]] = {}
        for run in runs:
            if view.kind(run) == kind.name:
                cells.setdefault((view.task_of(run), run["method"]), []).append(run)
        if cells:
            sections.append(Section(kind, view, {key: Cell(tuple(found), view) for key, found in cells.items()}))
    common, differing = compare_facts(runs, view)
    return Report(Path(folder), view, tuple(sections), common, differing, tuple(unfinished), tuple(runs))


def write_files(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.md`, `.csv`, `.tex` and `.html`; returns their paths.

    Raises:
        OSError: nothing can be written there.
    """
    paths = [Path(folder) / name for name in FILES]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    to_runs = Path(os.path.relpath(report.folder, folder)).as_posix()
    texts = (to_markdown(report), to_csv(report), to_latex(report), to_html(report, to_runs))
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, lambda beside, text=text: beside.write_text(text, encoding="utf-8"))
    return paths


# ------------------------------------------------------------------------------------------------ heads and cells


def task_rows(section: Section) -> list[list[str]]:
    """A task and a text for every method."""
    return [[task, *(str(section.cells.get((task, m), "–")) for m in section.methods)] for task in section.tasks]


def mean_rows(section: Section) -> list[list[str]]:
    """A mean over tasks and a text for every method."""
    averages = [section.averages(method) for method in section.methods]
    return [[mean.title, *(str(found[k]) for found in averages)] for k, mean in enumerate(section.kind.means)]


def paired_head(view: View) -> list[str]:
    """The columns of `paired_rows`."""
    counts = "initialisation against tasks better worse".split()
    return [*counts, f"mean difference{view.points}", "training loss (ratio)", "p"]


def paired_rows(section: Section) -> list[list[str]]:
    """Every method against the baseline."""

    def cells(found: Paired) -> list[str]:
        p = "–" if found.p is None else f"{found.p:.3f}"
        counts = [str(found.tasks), str(found.better), str(found.worse)]
        difference = f"{found.difference:+.{section.view.digits + 1}f}"
        return [found.method, found.baseline, *counts, difference, f"{found.loss_ratio:.2f}", p]

    return [cells(found) for found in section.paired()]


def beside_head(section: Section) -> list[str]:
    """The columns of `beside_rows`."""
    return ["method", *(mean.name for mean in section.kind.means)]


def beside_rows(section: Section) -> list[list[str]]:
    """Means of our methods and of the published ones, which are marked; none where nothing is published."""
    kind = section.kind
    ours = [[method, *map(str, section.averages(method))] for method in section.methods]
    others = [[f"{row.method} (published)", *published_means(row, kind.means)] for row in kind.published]
    return [*ours, *others] if others else []


def published_means(row: Published, means: Iterable[Mean]) -> list[str]:
    """The means of a published row, computed from its tasks."""
    return [f"{np.mean([np.mean([row.top1[task] for task in part]) for part in mean.parts]):.1f}" for mean in means]


def published_note(rows: Iterable[Published]) -> str:
    """How the published protocols differ."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        by_note.setdefault(row.note, []).append(row.method)
    return "Protocols: " + "; ".join(f"{', '.join(methods)}: {note}" for note, methods in by_note.items()) + "."


def run_head(view: View) -> list[str]:
    """The columns of `run_cells`."""
    return ["task", "initialisation", "seed", view.label, "file"]


def run_cells(run: Result, view: View) -> list[str]:
    """One run: what it is, its score and its file."""
    score = f"{view.shown(run):.{view.digits + 1}f}"
    return [view.task_of(run), run["method"], str(run["config"]["seed"]), score, run["file"]]


def notes(report: Report) -> list[str]:
    """What a reader of the tables must know."""
    lines = [f"± is the standard deviation over seeds. Every run is scored {report.view.moment}."]
    if any(cell.subset for section in report.sections for cell in section.cells.values()):
        lines.append(f"† {report.view.subset}; see the list of runs.")
    for section in report.sections:
        kind = section.kind.name
        if section.kind.note:
            lines.append(section.kind.note)
        lacking: dict[str, list[str]] = {}
        for method in section.methods:
            lacking.setdefault(", ".join(section.missing(method)), []).append(method)
        lines += [f"{kind}, {', '.join(m)}: without {tasks}." for tasks, m in lacking.items() if tasks]
        if alone := section.unpaired():
            lines.append(f"{kind}, not compared, as there is no {BASELINE} with equal settings: {'; '.join(alone)}.")
    others: dict[str, list[str]] = {}
    for run in report.runs:
        if run["other_data"]:
            others.setdefault(report.view.task_of(run), []).append(run["file"])
    lines += [
        f"{task}: {len(files)} runs are on other data than the rest, and are shown apart as 'other data': "
        f"{', '.join(files)}."
        for task, files in others.items()
    ]
    return [*lines, *(f"No result: {name} ({' '.join(why.split())})." for name, why in report.unfinished)]


# --------------------------------------------------------------------------------------------------------- formats


def to_markdown(report: Report) -> str:
    """All tables, without figures."""
    parts = ["# Report"]
    for section in report.sections:
        means = mean_rows(section)
        bold = [name for name, *_ in means]
        table = markdown_table(["task", *section.methods], [*task_rows(section), *means], bold)
        parts.append(f"## {markdown(section.title)}\n\n{table}")
        if paired := paired_rows(section):
            table = markdown_table(paired_head(report.view), paired)
            parts.append(f"Against {BASELINE}, paired over tasks:\n\n{table}")
        if beside := beside_rows(section):
            table, note = markdown_table(beside_head(section), beside), published_note(section.kind.published)
            parts.append(f"Means beside published ones (ViT-B/16 in21k):\n\n{table}\n\n{note}")
    parts.append("\n".join(f"- {markdown(line)}" for line in notes(report)))
    settings = (f"- {name}: {markdown(value)}" for name, value in report.settings.items())
    parts.append("## Settings\n\n" + "\n".join(settings))
    if report.differing:
        lines = [
            f"- {name}: " + "; ".join(f"{markdown(value)} ({len(files)} runs)" for value, files in values.items())
            for name, values in report.differing.items()
        ]
        parts.append("Settings that differ between runs:\n\n" + "\n".join(lines))
    table = markdown_table(run_head(report.view), (run_cells(run, report.view) for run in report.runs))
    return "\n\n".join([*parts, f"## All runs\n\n{table}"]) + "\n"


def to_csv(report: Report) -> str:
    """One line a run, with its file."""
    view = report.view

    def row(run: Result) -> dict[str, Any]:
        lost, config, task = run["information_loss"], run["config"], view.task_of(run)
        return {
            "task": task,
            "group": view.groups.get(task, ""),
            "method": run["method"],
            **{k: config[k] for k in ("init", "lr", "seed")},
            "source": view.source(run),
            **view.details(run),
            "training_loss": round(training_loss(run), 5),
            "information_loss": lost["after"]["overall"]["loss"] if lost else "",
            "seconds": round(sum(run["seconds"].values()), 1),
            "file": run["file"],
        }

    return csv_table([row(run) for run in report.runs])


def to_latex(report: Report) -> str:
    """A booktabs table a section."""
    parts = []
    for section in report.sections:
        table = latex_table(["task", *section.methods], task_rows(section), mean_rows(section))
        parts.append(f"% {one_line(section.title)}\n{table}")
        if beside := beside_rows(section):
            parts.append(f"% Means beside published ones\n{latex_table(beside_head(section), beside)}")
    files = (f"% {one_line(' '.join(run_cells(run, report.view)))}" for run in report.runs)
    return "\n\n".join([*parts, *(f"% {one_line(line)}" for line in notes(report)), "\n".join(files)]) + "\n"


def to_html(report: Report, to_runs: str = ".") -> str:
    """One page that needs nothing else: styles, script and figures are inside.

    Its links begin with `to_runs`, the way from the page's folder to the runs'.
    """
    view = report.view
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {
            "section": section,
            "rows": task_rows(section),
            "means": mean_rows(section),
            "paired": paired_rows(section),
            "beside_head": beside_head(section),
            "beside": beside_rows(section),
            "figures": [(title, _image(figure)) for title, figure in _figures(section)],
        }
        for section in report.sections
    ]
    kind = next((kind for kind in view.kinds if kind.published), view.kinds[0])
    return environment.get_template("report.html.jinja").render(
        report=report,
        view=view,
        to_runs=to_runs,
        sections=sections,
        notes=notes(report),
        baseline=BASELINE,
        paired_head=paired_head(view),
        kind=kind,
        published=[(row, published_means(row, kind.means)) for row in kind.published],
        published_note=published_note(kind.published),
    )


def _figures(section: Section) -> Iterable[tuple[str, Figure]]:
    from abm_vision.analysis.figures import report as figures

    score = section.view.title
    yield f"{score[0].upper()}{score[1:]} by task", figures.draw_tasks(section)
    yield "Training loss by epoch", figures.draw_convergence(section)
    if figure := figures.draw_lost(section):
        yield "Information loss by depth and kind of layer, mean over runs", figure


def _image(figure: Figure) -> str:
    """A data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
