"""`report`: of finished runs."""

from __future__ import annotations

import argparse

from abm_vision.runs.cli import Parser
from abm_vision.runs.view import View


def parser(view: View) -> Parser:
    """A folder of runs."""
    flags = Parser(
        f"{view.program} report",
        description="Tables, figures and statistics of the finished runs in a folder, as Markdown, CSV, "
        "LaTeX and one HTML page.",
    )
    flags.add_argument("folder", metavar="DIR", help="folder of the runs: --out of a suite or of single runs")
    flags.add_argument("--out", metavar="DIR", help="where to write report.md, .csv, .tex and .html (default: there)")
    return flags


def command(view: View, options: argparse.Namespace) -> int:
    """Write the report, and print it."""
    from abm_vision.analysis import report

    found = report.collect(options.folder, view)
    paths = report.write_files(found, options.out or options.folder)
    print(report.to_markdown(found), *paths, sep="\n")
    return 0
