"""Tables as Markdown, LaTeX, CSV and plain text; cells may hold any character."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import SEPARATING_LINE, DataRow, Line, TableFormat, tabulate

from abm_vision.abm.files import write_text
from abm_vision.runs.markup import latex, markdown, one_line

_LATEX_ROW = DataRow("", " & ", r" \\")
_BOOKTABS = TableFormat(  # tabulate's own escapes what is escaped here already, and less
    lineabove=Line(r"\toprule", "", "", ""),
    linebelowheader=Line(r"\midrule", "", "", ""),
    linebetweenrows=None,
    linebelow=Line(r"\bottomrule", "", "", ""),
    headerrow=_LATEX_ROW,
    datarow=_LATEX_ROW,
    padding=0,
    with_header_hide=None,
)


class Table(NamedTuple):
    """A head, and rows of cells."""

    head: list[str]
    rows: list[list[str]]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str | TableFormat) -> str:
    """Columns of numbers to the right, others and the first to the left; nothing is taken for a number."""
    first = next((row for row in rows if row is not SEPARATING_LINE), head)
    columns = ["right" if k and cell[:1] in "0123456789+-–" else "left" for k, cell in enumerate(first)]
    return tabulate(rows, head, tablefmt=style, disable_numparse=True, colalign=columns)


def plain_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a terminal."""
    lines = [[one_line(cell) for cell in row] for row in (head, *rows)]
    columns = ["left", *["right"] * (len(head) - 1)]
    return tabulate(lines, tablefmt="plain", disable_numparse=True, colalign=columns)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], bold: Collection[str] = ()) -> str:
    """A table of cells that are shown as they are; the names (first cells) among `bold` are set off."""
    strong = {markdown(name) for name in bold}
    lines = [[markdown(cell) for cell in row] for row in rows]
    lines = [[f"**{name}**" if name in strong else name, *cells] for name, *cells in lines]
    return _table([markdown(cell) for cell in head], lines, "pipe")


def latex_table(head: Sequence[str], *groups: Iterable[Sequence[object]]) -> str:
    """A booktabs table of cells that are shown as they are, with a rule between groups of rows."""
    lines: list[Any] = []
    for group in groups:
        if found := [[latex(cell) for cell in row] for row in group]:
            lines += [SEPARATING_LINE, *found] if lines else found
    table = _table([latex(cell) for cell in head], lines, _BOOKTABS)
    return f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}\n{table}\n\\end{{tabular}}"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each of the rows, which have the same keys."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def write_texts(folder: str | Path, texts: Mapping[str, str]) -> list[Path]:
    """Write a file of each name into a folder, which is made; returns their paths.

    Raises:
        OSError: nothing can be written there.
    """
    paths = [Path(folder) / name for name in texts]
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths
