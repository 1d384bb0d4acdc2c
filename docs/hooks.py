"""Hooks of mkdocs: options of the commands and the table of initialisations from the code, and formulas as MathML."""

from __future__ import annotations

import argparse
import importlib
import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

from abm_vision import INITIALIZERS
from abm_vision.runs.commands import Command

# `{{ options package command }}` becomes that command's options; one run goes without a name.
OPTIONS = re.compile(r"^\{\{ options ([\w.]+) ?([\w-]*) \}\}$", re.MULTILINE)
INITIALISATIONS = "{{ initialisations }}"
CODE = re.compile(r"<(pre|code|script|style)\b.*?</\1>", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace a page's placeholders."""
    filled = OPTIONS.sub(lambda found: options(_commands(found[1])[found[2]].parser()), markdown)
    return filled.replace(INITIALISATIONS, initialisations()) if INITIALISATIONS in filled else filled


def _commands(package: str) -> dict[str, Command]:
    return importlib.import_module(f"{package}.__main__").COMMANDS


def on_page_content(html: str, **_: Any) -> str:
    """Convert LaTeX between dollars, in pages and notebooks, to MathML, which browsers show without a script."""
    text, end = [], 0
    for code in CODE.finditer(html):
        text += [FORMULA.sub(_formula, html[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*text, FORMULA.sub(_formula, html[end:])])


def _formula(found: re.Match[str]) -> str:
    return convert(unescape(found[1] or found[2]), display="block" if found[1] else "inline")


def options(parser: argparse.ArgumentParser) -> str:
    """Return a parser's description and a table of its arguments."""
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(action.option_strings) or action.metavar or action.dest
        values = "" if action.nargs == 0 else "|".join(map(str, action.choices or [action.metavar or _kind(action)]))
        text = (action.help or "").replace("%%", "%").replace("|", "\\|")
        rows.append(f"| `{names}` | {values.replace('|', ', ')} | {text} |")
    return "\n".join([parser.description or "", "", "| option | value | what |", "| --- | --- | --- |", *rows])


def _kind(action: argparse.Action) -> str:
    return {int: "integer", float: "number"}.get(action.type, "text")


def initialisations() -> str:
    """Return a table of name, meaning, needs and source of every initialisation."""
    rows = [f"| `{s.name}` | {s.summary} | {s.needs} | {s.source} |" for s in INITIALIZERS.values()]
    return "\n".join(["| initialisation | what it does | needs | source |", "| --- | --- | --- | --- |", *rows])
