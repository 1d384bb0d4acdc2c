"""What documents take from the code: options of the commands, initialisations, messages, whole scripts."""

from __future__ import annotations

import argparse
import importlib
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from messages import ROOT, families, messages

from abm_vision import INITIALIZERS


def options(package: str, command: str = "") -> Callable[[], str]:
    """The table of a command's options; one run goes without a name."""

    def table() -> str:
        parser = importlib.import_module(f"{package}.__main__").COMMANDS[command].parser()
        return "\n".join(
            [parser.description or "", "", "| option | value | what |", "| --- | --- | --- |", *_rows(parser)]
        )

    table.__name__ = f"options {package} {command}".rstrip()
    return table


def _rows(parser: argparse.ArgumentParser) -> list[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(action.option_strings) or action.metavar or action.dest
        values = "" if action.nargs == 0 else "|".join(map(str, action.choices or [action.metavar or _kind(action)]))
        text = (action.help or "").replace("%%", "%").replace("|", "\\|")
        rows.append(f"| `{names}` | {values.replace('|', ', ')} | {text} |")
    return rows


def _kind(action: argparse.Action) -> str:
    return {int: "integer", float: "number"}.get(action.type, "text")


def whole(name: str) -> Callable[[], str]:
    """A script of `examples/` as it is."""

    def table() -> str:
        language = {".py": "python"}.get(Path(name).suffix, "bash")
        return f"```{language}\n{(ROOT / name).read_text(encoding='utf-8').rstrip()}\n```"

    table.__name__ = name
    return table


def initialisations() -> str:
    """Name, meaning, needs and source of every initialisation."""
    rows = [f"| `{s.name}` | {s.summary} | {s.needs} | {s.source} |" for s in INITIALIZERS.values()]
    return "\n".join(["| initialisation | what it does | needs | source |", "| --- | --- | --- | --- |", *rows])


def troubleshooting() -> str:
    """Every family of messages by topic: its members, what they mean, what to do."""
    found, lines = messages(), []
    for topic, group in groupby(families(), lambda family: family["topic"]):
        lines += [f"## {topic}", ""]
        for family in group:
            own = [text for text in found if any(re.search(words, text) for words in family["says"])]
            lines += [f"### {family['title']}", "", *(f"- {_as_code(text)}" for text in own), ""]
            lines += [f"{family['means']}", "", f"**What to do**: {family['do']}", ""]
    return "\n".join(lines[:-1])


def _as_code(text: str) -> str:
    return f"`` {text} ``" if "`" in text else f"`{text}`"
