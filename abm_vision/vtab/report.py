"""A report of the runs in a folder: tables, figures, and where every number comes from."""

from __future__ import annotations

import base64
import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

import vtab_tasks
from abm_vision import plots
from abm_vision.abm.files import write_atomically
from abm_vision.runs.markup import latex, markdown, markdown_table, one_line
from abm_vision.vtab.collection import Average, Paired, Report, Section, source
from abm_vision.vtab.comparison import BASELINE, area
from abm_vision.vtab.published import PUBLISHED, Published

FILES = ("report.md", "report.csv", "report.tex", "report.html")


def write_report(report: Report, folder: str | Path) -> list[Path]:
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
        if alone := section.unpaired():
            lines.append(
                f"{section.kind}, not compared, for want of {BASELINE} with equal settings: {'; '.join(alone)}."
            )
    for task in dict.fromkeys(run["config"]["task"] for run in report.runs if run["other_data"]):
        found = [run["file"] for run in report.runs if run["config"]["task"] == task and run["other_data"]]
        lines.append(
            f"{task}: {len(found)} runs are on other data than the rest, and are shown apart as 'other data': "
            f"{', '.join(found)}."
        )
    lines += [f"No result: {name} ({' '.join(why.split())})." for name, why in report.unfinished]
    return lines


def to_markdown(report: Report) -> str:
    """All tables, without figures."""
    parts = ["# Report"]
    for section in report.sections:
        lines = rows_of(section)
        bold = [name for kind, name, _ in lines if kind == "mean"]
        table = markdown_table(["task", *section.methods], ([name, *cells] for _, name, cells in lines), bold)
        parts.append(f"## {markdown(section.title)}\n\n{table}")
        if paired := section.paired():
            table = markdown_table(PAIRED, map(_paired_cells, paired))
            parts.append(f"Against {BASELINE}, paired over tasks:\n\n{table}")
        if section.kind == "real":
            table = markdown_table(BESIDE, beside_published(section))
            parts.append(f"Means beside published ones (ViT-B/16 in21k):\n\n{table}\n\n{published_note()}")
    parts.append("\n".join(f"- {markdown(line)}" for line in notes(report)))
    settings = (f"- {name}: {markdown(value)}" for name, value in report.settings.items())
    parts.append("## Settings\n\n" + "\n".join(settings))
    if report.differing:
        lines = [
            f"- {name}: " + "; ".join(f"{markdown(value)} ({len(files)} runs)" for value, files in values.items())
            for name, values in report.differing.items()
        ]
        parts.append("Settings that differ between runs:\n\n" + "\n".join(lines))
    head = ["task", "start", "seed", "top-1 (%)", "file"]
    parts.append(f"## All runs\n\n{markdown_table(head, map(_run_cells, report.runs))}")
    return "\n\n".join(parts) + "\n"


PAIRED = ["start", "against", "tasks", "better", "worse", "mean difference (points)", "training loss area (ratio)", "p"]
BESIDE = ["method", "Natural", "Specialized", "Structured", "m19", "m3"]


def beside_published(section: Section) -> list[list[str]]:
    """Means of our methods and of the published ones, which are marked."""
    ours = [[method, *map(str, section.averages(method))] for method in section.methods]
    return [*ours, *([f"{row.method} (published)", *published_means(row)] for row in PUBLISHED)]


def _run_cells(run: dict[str, Any]) -> list[str]:
    config = run["config"]
    return [config["task"], run["method"], str(config["seed"]), f"{100 * run['test']['top1']:.2f}", run["file"]]


def _paired_cells(paired: Paired) -> list[str]:
    p = "–" if paired.p is None else f"{paired.p:.3f}"
    counts = [str(paired.tasks), str(paired.better), str(paired.worse)]
    return [paired.method, paired.baseline, *counts, f"{paired.difference:+.2f}", f"{paired.area_ratio:.2f}", p]


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
    head = "task group method init lr seed source top1 correct count split_size loss_area information_loss seconds file"
    writer = csv.DictWriter(stream, head.split(), lineterminator="\n")
    writer.writeheader()
    for run in report.runs:
        lost, config, test = run["information_loss"], run["config"], run["test"]
        writer.writerow(
            {
                "task": config["task"],
                "group": vtab_tasks.get_task(config["task"]).group,
                "method": run["method"],
                **{k: config[k] for k in ("init", "lr", "seed")},
                "source": source(run),
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
            body.append(" & ".join([latex(name), *map(latex, cells)]) + r" \\")
        columns = "l" + "r" * len(section.methods)
        head = " & ".join(["task", *map(latex, section.methods)])
        above = [
            f"% {one_line(section.title)}",
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
        ]
        parts.append("\n".join([*above, *body, r"\bottomrule", r"\end{tabular}"]))
        if section.kind == "real":
            head = " & ".join(BESIDE)
            rows = [" & ".join(map(latex, cells)) + r" \\" for cells in beside_published(section)]
            above = [
                "% Means beside published ones",
                r"\begin{tabular}{lrrrrr}",
                r"\toprule",
                rf"{head} \\",
                r"\midrule",
            ]
            parts.append("\n".join([*above, *rows, r"\bottomrule", r"\end{tabular}"]))
    files = (f"% {one_line(' '.join(_run_cells(run)))}" for run in report.runs)
    return "\n\n".join([*parts, *(f"% {one_line(line)}" for line in notes(report)), "\n".join(files)]) + "\n"


def to_html(report: Report, to_runs: str = ".") -> str:
    """One page that needs nothing else: styles, script and figures are inside.

    Its links begin with `to_runs`, the way from the page's folder to the runs'.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    sections = [
        {
            "section": section,
            "rows": rows_of(section),
            "paired": [_paired_cells(p) for p in section.paired()],
            "beside": beside_published(section) if section.kind == "real" else [],
            "figures": [(title, _image(figure)) for title, figure in _figures(section)],
        }
        for section in report.sections
    ]
    return environment.get_template("report.html.jinja").render(
        report=report,
        to_runs=to_runs,
        sections=sections,
        notes=notes(report),
        baseline=BASELINE,
        paired_head=PAIRED,
        beside_head=BESIDE,
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
