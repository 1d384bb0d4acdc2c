"""What the views of GLUE and of instructions (`abm_vision.runs.view`) have in common."""

from __future__ import annotations

from typing import Any

from abm_vision.runs.cli import Parser
from abm_vision.runs.view import Kind, Mean

ASKED = ("data",)  # a folder or a name; the content is in the result's origin
STAND_IN = "stand-in"


def kinds(title: str, stand_ins: str, tasks: tuple[str, ...], means: tuple[Mean, ...] = ()) -> tuple[Kind, Kind]:
    """Real data and models, and those that this package makes itself, with the titles of their tables."""
    note = "Stand-ins, models or data, are made by this package. Their scores compare with nothing published."
    return Kind("real", title, tasks, means), Kind(STAND_IN, stand_ins, tasks, means, note=note)


def kind(result: dict[str, Any]) -> str:
    """The name of a result's kind."""
    return STAND_IN if result["tiny"] or result["data"]["train"]["source"] == "synthetic" else "real"


def content(result: dict[str, Any]) -> dict[str, Any]:
    """Hashes of all examples and of the code that makes tokens of them."""
    return {name: value for name, value in result["origin"].items() if name.endswith(" data") or name == "encoding"}


def add_flags(flags: Parser) -> None:
    """Flags of a run on text that do not change its result."""
    text = "save what an interrupted run is resumed from after so many minutes, and after every epoch (default: 10)"
    flags.add_argument("--save-minutes", type=float, default=10.0, help=text)


def circumstances(result: dict[str, Any]) -> dict[str, Any]:
    """The number of processes, which decides how many examples are in a training step."""
    return {"processes": result["processes"]}
