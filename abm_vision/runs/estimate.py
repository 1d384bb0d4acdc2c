"""Say once, after the first steps, how long the rest of a training will take."""

from __future__ import annotations

import time
from collections.abc import Callable

FIRST, LAST = 3, 8  # steps between which the time is measured; the first ones allocate memory, or are captured
WORTH = 10.0  # seconds below which nothing is said


class TimeLeft:
    """Count the steps of a training, and say the time that is left after `LAST` of them.

    Args:
        steps: how many there will be.
        say: takes the line.
    """

    def __init__(self, steps: int, say: Callable[[str], None]) -> None:
        self._left, self._say = steps, say
        self._done, self._began = 0, 0.0

    def step(self, wait: Callable[[], object]) -> None:
        """Count a step; `wait` returns when the device has made it, and is called where the time is taken."""
        self._done += 1
        self._left -= 1
        if self._done == FIRST:
            wait()
            self._began = time.perf_counter()
        elif self._done == LAST:
            wait()
            seconds = self._left * (time.perf_counter() - self._began) / (LAST - FIRST)
            if seconds >= WORTH:
                self._say(f"training  {self._left} more steps, about {in_words(seconds)}")

    def skip(self, seconds: float) -> None:
        """Leave out what was no training step, such as a test on the way."""
        self._began += seconds


def in_words(seconds: float) -> str:
    """Two digits of seconds, minutes or hours."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.{int(seconds < 10 * unit)}f} {name}"
    return f"{seconds:.0f} s"
