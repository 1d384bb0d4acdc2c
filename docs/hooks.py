"""What the pages take from the code: every option of every command, and the table of starts."""

from __future__ import annotations

import argparse
import importlib
import re
from typing import Any

from abm_vision import INITIALIZERS

# `{{ options module:function }}` becomes that parser's options, `{{ starts }}` the table of starts.
OPTIONS = re.compile(r"^\{\{ options ([\w.]+):(\w+) \}\}$", re.MULTILINE)
STARTS = "{{ starts }}"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's marks."""
    filled = OPTIONS.sub(lambda found: options(getattr(importlib.import_module(found[1]), found[2])()), markdown)
    return filled.replace(STARTS, starts()) if STARTS in filled else filled


def options(parser: argparse.ArgumentParser) -> str:
    """A parser's description and a table of its arguments."""
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


def starts() -> str:
    """Name, meaning, needs and source of every start."""
    rows = [f"| `{s.name}` | {s.summary} | {s.needs} | {s.source} |" for s in INITIALIZERS.values()]
    return "\n".join(["| start | what it does | needs | source |", "| --- | --- | --- | --- |", *rows])
