"""Checks of arguments. No torch: settings are made, and a command line is read, without it."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

KINDS = ("all", "attention", "mlp")  # of projections that `add_lora` takes as `targets`
QKV_MODES = ("full", "qv")
STEP_MODES = ("auto", "eager", "graph")  # of `TrainingStep`


def check_choice(field: str, value: object, allowed: Sequence[str], hint: str = "") -> None:
    """Raise a ValueError naming the allowed values unless `value` is one of them."""
    if value not in allowed:
        choices = ", ".join(repr(a) for a in allowed)
        raise ValueError(f"{field} is {value!r}; allowed are {choices}{', ' + hint if hint else ''}")


def nearest(name: object, known: Iterable[str], count: int = 2) -> str:
    """Return a question for the end of a message, with the known names that are most like an unknown one."""
    names = difflib.get_close_matches(str(name), list(known), n=count)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def are(names: Iterable[str]) -> str:
    """Return names and their verb: "steps is", "samples, steps are"."""
    found = list(names)
    return f"{', '.join(found)} {'is' if len(found) == 1 else 'are'}"


def count(number: int, what: str) -> str:
    """Return a number of things: "1 epoch", "2 epochs"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def check_whole(field: str, value: object, low: int) -> None:
    """Raise a ValueError unless `value` is a whole number of at least `low`."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{field} is {value!r}; it must be a whole number of {low} or more")


def check_seed(value: object) -> None:
    """Raise a ValueError unless torch's generators take it as a seed."""
    check_whole("seed", value, 0)
    if value >= 2**63:
        raise ValueError(f"seed is {value}; it must be less than 2 ** 63")


def check_type(field: str, value: object, kind: type) -> None:
    """Raise a ValueError unless `value` is of that kind."""
    if not isinstance(value, kind):
        raise ValueError(f"{field} is {value!r}; it must be of type {kind.__name__}, or None for its defaults")


def check_real(field: str, value: object, low: float, *, above: bool = False) -> None:
    """Raise a ValueError unless `value` is a finite number of at least `low`, or `above` it."""
    fits = isinstance(value, Real) and not isinstance(value, bool) and (value > low if above else value >= low)
    if not fits or value == math.inf:
        wanted = f"above {low:g}" if above else f"of {low:g} or more"
        raise ValueError(f"{field} is {value!r}; it must be a finite number {wanted}")
