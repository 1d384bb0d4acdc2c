"""What is seen of a run while it trains: the log, TensorBoard's files, the live plot, progress bars."""

import sys
import types

import pytest
import torch
from conftest import build_vit
from helpers import FLAGS, small_glue, tiny

from abm_vision import ABMConfig, LivePlot, add_lora, initialize_lora_abm_weights
from abm_vision.abm import bars
from abm_vision.runs.log import opened
from abm_vision.vtab import run
from abm_vision.vtab.__main__ import main


class Kept:
    """A log that keeps what it receives: name to (steps, values)."""

    def __init__(self):
        self.kept = {}

    def __call__(self, name, value, step):
        steps, values = self.kept.setdefault(name, ([], []))
        steps.append(step)
        values.append(value)


def test_harness_tells_every_step(tmp_path):
    log = Kept()
    result = run(tiny(eval_epochs=1, warmup=0.0, schedule="constant"), tmp_path, log=log)
    steps = list(range(1, len(result["loss_per_step"]) + 1))
    assert log.kept["train/loss"] == (steps, result["loss_per_step"])
    assert log.kept["train/lr"] == (steps, [result["config"]["lr"]] * len(steps))
    half = len(steps) // 2
    assert log.kept["test/top1"] == ([half, 2 * half], list(result["top1_per_epoch"].values()))


def test_glue_tells_every_step(t5, tmp_path):
    log = Kept()
    pytest.importorskip("datasets", reason="datasets is not installed")
    from nlp_ext.glue import run as run_glue

    result = run_glue(small_glue(t5, epochs=1), tmp_path, log=log)
    steps = list(range(1, len(result["loss_per_step"]) + 1))
    assert log.kept["train/loss"] == (steps, result["loss_per_step"])
    assert log.kept["train/lr"][0] == steps and max(log.kept["train/lr"][1]) <= result["config"]["lr"]


@pytest.mark.slow
def test_tensorboard_reads_what_the_command_writes(tmp_path, capsys):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([*FLAGS, "--out", str(tmp_path), "--log", "tensorboard", "--quiet"]) == 0
    (folder,) = tmp_path.glob("*/tensorboard")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/lr", "test/top1"} == set(events.Tags()["scalars"])
    result = run(tiny(), tmp_path)
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(result["loss_per_step"])
    run(tiny(), tmp_path, rerun=True)
    assert not folder.exists()


def test_tensorboard_that_is_not_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert main([*FLAGS, "--out", str(tmp_path), "--log", "tensorboard", "--quiet"]) == 2
    assert "error: --log tensorboard needs it: pip install tensorboard" in capsys.readouterr().err


def test_no_log_and_nothing_logged(tmp_path):
    with opened(None, tmp_path) as log:
        assert log is None
    with opened("tensorboard", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_live_plot_draws_what_it_was_told(monkeypatch):
    shown, times = [], iter([0.0, 0.0, 0.4, 5.0, 5.0, 5.1, 5.2])
    monkeypatch.setattr("abm_vision.live.time.monotonic", lambda: next(times))
    handle = types.SimpleNamespace(update=shown.append)
    pytest.importorskip("IPython", reason="IPython is not installed")
    monkeypatch.setattr("IPython.display.display", lambda figure, display_id: shown.append(figure) or handle)
    plot = LivePlot(every=1.0)
    plot._drawn = -9.0
    for step, value in enumerate((3.0, 2.0, 1.0), 1):
        plot("train/loss", value, step)
    assert len(shown) == 2  # not at 0.4 s
    plot("train/lr", 0.1, 3)
    assert len(shown) == 2
    plot("test/top1", 0.5, 3)
    assert len(shown) == 3
    left, right = plot.figure().axes
    assert left.lines[0].get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
    assert [line.get_label() for line in right.lines] == ["test/top1: 0.500"]


def test_bars_are_for_those_who_watch(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    assert not bars.watched()
    model = add_lora(build_vit(), rank=2, alpha=2)
    initialize_lora_abm_weights(model, [torch.randn(4, 3, 32, 32)], ABMConfig(steps=2, samples=4))
    assert capsys.readouterr().err == ""  # a log has no use for bars
    kernel = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: kernel))
    assert bars.watched()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not bars.watched()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bars.watched() and list(bars.progress("ab", "title", show=False)) == ["a", "b"]
