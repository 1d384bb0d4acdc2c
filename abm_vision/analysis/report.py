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

from abm_vision.analysis.load import OTHER_DATA, Finished, compare_facts, find, grouped
from abm_vision.analysis.sections import Cell, Paired, Section
from abm_vision.analysis.stats import training_loss
from abm_vision.analysis.tables import Table, csv_table, latex_table, markdown_table, write_texts
from abm_vision.initializers import BASELINE
from abm_vision.runs.markup import markdown, one_line
from abm_vision.runs.view import Mean, Published, View

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
        runs: by task, method and seed.
    """

    folder: Path
    view: View
    sections: tuple[Section, ...]
    settings: dict[str, Any]
    differing: dict[str, dict[str, list[str]]]
    unfinished: tuple[tuple[str, str], ...]
    runs: tuple[Finished, ...]


def collect(folder: str | Path, view: View) -> Report:
    """Read the finished runs below a folder. Runs of a selection are left out.

    A result that cannot be read is named among what has none, with the reason.

    Raises:
        FileNotFoundError: there is no finished run.
    """
    runs, unfinished = find(Path(folder), view)
    sections = []
    for kind in view.data.kinds:
        cells = grouped((run for run in runs if run.kind == kind.name), lambda run: (run.task, run.method))
        if cells:
            sections.append(Section(kind, view, {key: Cell(tuple(found), view) for key, found in cells.items()}))
    common, differing = compare_facts(runs)
    return Report(Path(folder), view, tuple(sections), common, differing, tuple(unfinished), tuple(runs))


def write_files(report: Report, folder: str | Path) -> list[Path]:
    """Write `report.md`, `.csv`, `.tex` and `.html`; returns their paths.

    Raises:
        OSError: nothing can be written there.
    """
    to_runs = Path(os.path.relpath(report.folder, folder)).as_posix()
    texts = {
        "md": to_markdown(report),
        "csv": to_csv(report),
        "tex": to_latex(report),
        "html": to_html(report, to_runs),
    }
    return write_texts(folder, {f"report.{suffix}": text for suffix, text in texts.items()})


# ---------------------------------------------------------------------------------------------------------- tables


def task_rows(section: Section) -> list[list[str]]:
    """A task and a text for every method."""
    return [[task, *(str(section.cells.get((task, m), "–")) for m in section.methods)] for task in section.tasks]


def mean_rows(section: Section) -> list[list[str]]:
    """A mean over tasks and a text for every method."""
    averages = [section.averages(method) for method in section.methods]
    return [[mean.title, *(str(found[k]) for found in averages)] for k, mean in enumerate(section.kind.means)]


def paired_table(section: Section) -> Table:
    """Every method against the baseline."""

    def cells(found: Paired) -> list[str]:
        p = "–" if found.p is None else f"{found.p:.3f}"
        counts = [str(found.tasks), str(found.better), str(found.worse)]
        difference = f"{found.difference:+.{score.digits + 1}f}"
        return [
            section.heads[found.method],
            section.heads[found.baseline],
            *counts,
            difference,
            f"{found.loss_ratio:.2f}",
            p,
        ]

    score = section.view.score
    head = [*"initialisation against tasks better worse".split(), f"mean difference{score.points}"]
    return Table([*head, "training loss (ratio)", "p"], [cells(found) for found in section.paired()])


def beside_table(section: Section) -> Table:
    """Means of our methods and of the published ones, which are marked; no rows where nothing is published."""
    kind = section.kind
    ours = [[head, *map(str, section.averages(method))] for method, head in section.heads.items()]
    others = [[f"{row.method} (published)", *published_means(row, kind.means)] for row in kind.published]
    return Table(["method", *(mean.name for mean in kind.means)], [*ours, *others] if others else [])


def published_means(row: Published, means: Iterable[Mean]) -> list[str]:
    """The means of a published row, computed from its tasks."""
    return [f"{np.mean([np.mean([row.scores[task] for task in part]) for part in mean.parts]):.1f}" for mean in means]


def published_note(rows: Iterable[Published]) -> str:
    """How the published protocols differ."""
    alike = grouped(rows, lambda row: row.note)
    parts = [f"{', '.join(row.method for row in found)}: {note}" for note, found in alike.items()]
    return f"Protocols: {'; '.join(parts)}."


def run_table(report: Report) -> Table:
    """Every run: what it is, its score and its file."""
    score = report.view.score
    digits = score.digits + 1
    rows = [[r.task, r.method, str(r.seed), f"{score.shown(r.result):.{digits}f}", r.file] for r in report.runs]
    return Table(["task", "initialisation", "seed", score.label, "file"], rows)


def notes(report: Report) -> list[str]:
    """What a reader of the tables must know."""
    lines = [f"± is the standard deviation over seeds. Every run is scored {report.view.score.moment}."]
    if any(cell.subset for section in report.sections for cell in section.cells.values()):
        lines.append(f"† {report.view.data.subset}; see the list of runs.")
    for section in report.sections:
        kind = section.kind.name
        if section.kind.note:
            lines.append(section.kind.note)
        lacking = grouped(section.methods, lambda method, section=section: ", ".join(section.missing(method)))
        lines += [f"{kind}, {', '.join(m)}: without {tasks}." for tasks, m in lacking.items() if tasks]
        if alone := section.unpaired():
            lines.append(f"{kind}, not compared, as there is no {BASELINE} with equal settings: {'; '.join(alone)}.")
    others = grouped((run for run in report.runs if run.facts[OTHER_DATA]), lambda run: run.task)
    lines += [
        f"{task}: {len(runs)} runs are on other data than the rest, and are shown apart as 'other data': "
        f"{', '.join(run.file for run in runs)}."
        for task, runs in others.items()
    ]
    return [*lines, *(f"No result: {name} ({why})." for name, why in report.unfinished)]


# --------------------------------------------------------------------------------------------------------- formats


def to_markdown(report: Report) -> str:
    """All tables, without figures."""
    parts = ["# Report"]
    for section in report.sections:
        means = mean_rows(section)
        bold = [name for name, *_ in means]
        table = markdown_table(["task", *section.heads.values()], [*task_rows(section), *means], bold)
        parts.append(f"## {markdown(section.title)}\n\n{table}")
        if (paired := paired_table(section)).rows:
            parts.append(f"Against {BASELINE}, paired over tasks:\n\n{markdown_table(*paired)}")
        if (beside := beside_table(section)).rows:
            table, note = markdown_table(*beside), published_note(section.kind.published)
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
    return "\n\n".join([*parts, f"## All runs\n\n{markdown_table(*run_table(report))}"]) + "\n"


def to_csv(report: Report) -> str:
    """One line a run, with its file."""
    view = report.view

    def row(run: Finished) -> dict[str, Any]:
        result, lost = run.result, run.result["information_loss"]
        return {
            "task": run.task,
            "group": view.groups.get(run.task, ""),
            "method": run.method,
            **{name: result["config"][name] for name in ("init", "lr", "seed")},
            "source": view.data.source(result),
            **view.score.columns(result),
            "training_loss": round(training_loss(result), 5),
            "information_loss": lost["after"]["overall"]["loss"] if lost else "",
            "seconds": round(sum(result["seconds"].values()), 1),
            "file": run.file,
        }

    return csv_table([row(run) for run in report.runs])


def to_latex(report: Report) -> str:
    """A booktabs table a section."""
    parts = []
    for section in report.sections:
        table = latex_table(["task", *section.heads.values()], task_rows(section), mean_rows(section))
        parts.append(f"% {one_line(section.title)}\n{table}")
        if (beside := beside_table(section)).rows:
            parts.append(f"% Means beside published ones\n{latex_table(*beside)}")
    files = (f"% {one_line(' '.join(cells))}" for cells in run_table(report).rows)
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
            "paired": paired_table(section),
            "beside": beside_table(section),
            "figures": [(title, _image(figure)) for title, figure in _figures(section)],
        }
        for section in report.sections
    ]
    kind = next((kind for kind in view.data.kinds if kind.published), view.data.kinds[0])
    return environment.get_template("report.html.jinja").render(
        report=report,
        view=view,
        to_runs=to_runs,
        sections=sections,
        notes=notes(report),
        baseline=BASELINE,
        kind=kind,
        published=[(row, published_means(row, kind.means)) for row in kind.published],
        published_note=published_note(kind.published),
    )


def _figures(section: Section) -> Iterable[tuple[str, Figure]]:
    from abm_vision.analysis import figures

    score = section.view.score.title
    yield f"{score[0].upper()}{score[1:]} by task", figures.draw_tasks(section)
    if figure := figures.draw_differences(section):
        words = "paired by seed: a dot a seed (in the last row a task), a mark at the mean"
        yield f"Differences to {BASELINE}, {words}", figure
    yield "Training loss by epoch", figures.draw_convergence(section)
    if figure := figures.draw_lost(section):
        yield "Information loss by depth and kind of layer, mean over runs", figure


def _image(figure: Figure) -> str:
    """A data URI."""
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()
