"""The time that is left, with a clock of the test's own."""

import pytest
from conftest import TINY

from abm_vision import vtab
from abm_vision.runs import checkpoint, estimate
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
    clock, lines, waits = [0.0], [], []
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: clock[0])
    left = TimeLeft(steps, lines.append)
    for step in range(steps):
        clock[0] += 30.0 if step == 0 else lasting  # the first step is slow
        left.step(lambda: waits.append(1))
        if step == 4:  # a test on the way
            clock[0] += 50.0
            left.skip(50.0)
    assert lines == line and len(waits) == (2 if steps > 8 else 1)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(11.6, "12 s"), (119, "119 s"), (150, "2.5 min"), (1500, "25 min"), (8100, "2.2 h"), (90000, "25 h")],
)
def test_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.slow
def test_images_say_it(monkeypatch, tmp_path):
    """Four steps an epoch; a resumed run has those left that it still makes."""
    monkeypatch.setattr(estimate, "WORTH", 0.0)
    lines = []
    vtab.run(vtab.make_config(**{**TINY, "epochs": 3, "init": "kaiming"}), tmp_path, say=lines.append)
    assert [line[:24] for line in lines if line.startswith("training")] == ["training  4 more steps, "]
    save, run = checkpoint.save, vtab.make_config(**{**TINY, "epochs": 4, "init": "kaiming"})

    def die(*given):
        save(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", die)
        vtab.run(run, tmp_path)
    vtab.run(run, tmp_path, say=lines.append)
    assert [line[:24] for line in lines if line.startswith("training")][1:] == ["training  4 more steps, "]


@pytest.mark.slow
def test_text_says_it(monkeypatch, llama, tmp_path):
    pytest.importorskip("trl", reason="trl is not installed")
    from helpers import small_instruct

    from nlp_ext import instruct

    monkeypatch.setattr(estimate, "WORTH", 0.0)
    lines = []
    config = small_instruct(llama, init="kaiming", train_examples=160, max_steps=10, epochs=1)
    instruct.run(config, tmp_path, say=lines.append)
    assert [line[:24] for line in lines if line.startswith("training")] == ["training  2 more steps, "]
