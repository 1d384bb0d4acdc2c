"""The time that is left, with a clock of the test's own."""

import pytest

from abm_vision.runs import estimate
from abm_vision.runs.estimate import TimeLeft, in_words


@pytest.mark.parametrize(
    ("steps", "lasting", "line"),
    [
        (208, 2.0, ["training  200 more steps, about 6.7 min"]),
        (208, 0.06, ["training  200 more steps, about 12 s"]),
        (208, 0.04, []),  # eight seconds are soon over
        (7, 60.0, []),
    ],
)
def test_it_is_said_once_after_the_first_steps(steps, lasting, line, monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    left = TimeLeft(steps, lines.append)
    for step in range(steps):
        clock[0] += 30.0 if step == 0 else lasting  # the first step is slow
        left.step(lambda: None)
    assert lines == line


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(11.6, "12 s"), (119, "119 s"), (150, "2.5 min"), (1500, "25 min"), (8100, "2.2 h"), (90000, "25 h")],
)
def test_in_words(seconds, words):
    assert in_words(seconds) == words
