"""Training on text: checkpoints within an epoch, a bound on the steps, perplexity on the way, what deepspeed is."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")

from helpers import answer, small_glue, small_instruct

from abm_vision.analysis.stats import epochs_to
from abm_vision.runs import epochs
from abm_vision.runs.figures import draw_training
from abm_vision.runs.harness import Session
from nlp_ext import glue, instruct, trainer
from nlp_ext.instruct import harness
from nlp_ext.instruct.__main__ import main as instruct_main
from nlp_ext.instruct.config import InstructConfig

OFTEN = 1e-9  # minutes: a checkpoint after every step


def killed_in(step, run, config, out, monkeypatch):
    """Break a run off as soon as a step's checkpoint is whole."""
    saved = trainer.Progress.on_save

    def die(self, args, state, control, **more):
        saved(self, args, state, control, **more)
        if state.global_step == step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Progress, "on_save", die)
        run(config, out, save_minutes=OFTEN)


def adapter_of(result):
    return (Path(result["folder"]) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_killed_within_an_epoch_resumes_there(t5, tmp_path, monkeypatch):
    """Dropout is drawn as in the whole run, too; the seconds of the epoch's first part are kept.

    A bound beyond all epochs, of 3 steps each, changes nothing.
    """
    config = small_glue(t5, init="kaiming", dropout=0.2, train_examples=48, validation_examples=2, max_steps=99)
    whole = glue.run(config, tmp_path / "whole")
    killed_in(5, glue.run, config, tmp_path / "killed", monkeypatch)
    kept = json.loads(next(tmp_path.glob("killed/*/checkpoints/checkpoint-5/progress.json")).read_text())
    seen, lines = [], []
    monkeypatch.setattr(
        trainer.Progress, "on_step_end", lambda self, args, state, *rest, **more: seen.append(state.global_step)
    )
    resumed = glue.run(config, tmp_path / "killed", say=lines.append)
    assert seen == [6]
    assert "resumed   after step 5, in epoch 2 of 2" in lines
    assert [line[:14] for line in lines if line.startswith("epoch")] == ["epoch   2 loss"]
    assert resumed["loss_per_step"] == whole["loss_per_step"] and resumed["scores"] == whole["scores"]
    assert adapter_of(resumed) == adapter_of(whole)
    assert kept["seconds"] == resumed["seconds_per_epoch"][:1] and len(resumed["seconds_per_epoch"]) == 2
    assert resumed["seconds_per_epoch"][1] > kept["running"] > 0


FOLLOWED = {"init": "kaiming", "train_examples": 96, "eval_steps": 2, "max_steps": 8, "lr": 0.3}  # 6 steps an epoch


@pytest.fixture(scope="module")
def followed(llama, tmp_path_factory):
    """A run of one epoch and a third, its lines and what it logged."""
    lines, logged = [], []
    result = instruct.run(
        small_instruct(llama, **FOLLOWED),
        tmp_path_factory.mktemp("followed"),
        say=lines.append,
        log=lambda name, value, step: logged.append((name, step, value)),
    )
    return result, lines, logged


def test_perplexity_on_the_way(followed):
    result, lines, logged = followed
    values = result["perplexity_per_step"]
    assert list(values) == ["2", "4", "6", "8"] and values["8"] == result["perplexity"]["after"]
    assert [(step, value) for name, step, value in logged if name == "val/perplexity"] == [
        (int(step), value) for step, value in values.items()
    ]
    assert f"step     4 perplexity of held-out answers {values['4']:.2f}" in lines
    assert (len(result["loss_per_step"]), len(result["seconds_per_epoch"]), result["steps_per_epoch"]) == (8, 2, 6)
    assert result["best_step"] is None and (Path(result["folder"]) / "curves.png").stat().st_size


def test_measuring_changes_nothing_and_the_schedule_ends_with_the_steps(followed, llama, tmp_path):
    rates = {}
    config = small_instruct(llama, **{**FOLLOWED, "eval_steps": 0})
    result = instruct.run(config, tmp_path, log=lambda name, value, step: rates.update({(name, step): value}))
    assert result["loss_per_step"] == followed[0]["loss_per_step"] and not result["perplexity_per_step"]
    assert result["perplexity"] == followed[0]["perplexity"]
    assert rates["val/perplexity", 8] == result["perplexity"]["after"]
    # One of 8 steps is the warm-up (a share of .1), the cosine of the seven others ends at zero; rates before a step.
    expected = [0.0] + [0.3 * (1 + math.cos(math.pi * k / 7)) / 2 for k in range(7)]
    assert [rates["train/lr", step] for step in range(1, 9)] == pytest.approx(expected)


@pytest.mark.slow
def test_the_best_weights_are_kept_also_by_a_resumed_run(followed, llama, tmp_path, monkeypatch):
    """The learning rate is so high that the last step is not the best."""
    values = followed[0]["perplexity_per_step"]
    best = min(values, key=values.get)
    assert best == "2"
    config = small_instruct(llama, **FOLLOWED, keep="best")
    whole = instruct.run(config, tmp_path / "whole")
    assert whole["perplexity_per_step"] == values and whole["best_step"] == int(best)
    assert whole["perplexity"]["after"] == values[best]
    killed_in(7, instruct.run, config, tmp_path / "killed", monkeypatch)
    measured, measure = [], harness.perplexity
    monkeypatch.setattr(harness, "perplexity", lambda *given: measured.append(1) or measure(*given))
    resumed = instruct.run(config, tmp_path / "killed")
    assert len(measured) == 1  # after the last step; that of the pretrained model is known
    assert resumed["perplexity"] == whole["perplexity"]
    assert resumed["perplexity_per_step"] == values and adapter_of(resumed) == adapter_of(whole)
    assert adapter_of(resumed) != adapter_of(followed[0])


@pytest.mark.slow
def test_a_part_of_an_epoch_in_a_comparison(followed, llama, capsys):
    """Its curve has a point at the middle of the part, and seconds are those of whole epochs."""
    result = followed[0]
    assert list(epochs.middles(result)) == pytest.approx([0.5, (1 + 8 / 6) / 2])
    losses, (first, part) = result["loss_per_step"], result["seconds_per_epoch"]
    assert list(epochs.mean_losses(result)) == pytest.approx([sum(losses[:6]) / 6, sum(losses[6:]) / 2])
    assert epochs.seconds(result) == pytest.approx((first + 3 * part) / 2)
    assert epochs_to([result], -1.0) is None and epochs_to([result], 1e9) == 1.0
    out = Path(result["folder"]).parent
    instruct.run(small_instruct(llama, **{**FOLLOWED, "init": "gaussian"}), out)
    assert answer(["compare", out, f"--report={out}", "--quiet"], capsys, instruct_main)[0] == 0
    assert (out / "compare.png").is_file() and "2 epochs (8 steps at most)" in (out / "compare.md").read_text()


def test_a_picture_of_a_small_part_of_an_epoch(followed):
    result = {**followed[0], "steps_per_epoch": 100}
    figure = draw_training(result, "title")
    axes, right = figure.axes
    assert axes.get_xlim() == pytest.approx((0, 0.084)) and list(right.lines[0].get_xdata()) == [0.02, 0.04, 0.06, 0.08]
    assert right.get_ylabel() == "held-out perplexity" and figure.get_suptitle().startswith("title\nllama0, LoRA r = 2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "batch_size": 2, "length": 192},
        {"checkpointing": True, "accumulation": 2, "batch_size": 8, "dropout": 0.2},
        {"init": "pissa", "precision": "bf16"},
    ],
)
def test_every_kind_of_training_resumes_within_an_epoch(llama, tmp_path, monkeypatch, settings):
    config = small_instruct(llama, **settings)
    whole = instruct.run(config, tmp_path / "whole")
    step = whole["steps_per_epoch"] + 2
    killed_in(step, instruct.run, config, tmp_path / "killed", monkeypatch)
    lines = []
    resumed = instruct.run(config, tmp_path / "killed", say=lines.append)
    assert f"resumed   after step {step}, in epoch 2 of 2" in lines
    assert resumed["loss_per_step"] == whole["loss_per_step"] and adapter_of(resumed) == adapter_of(whole)


def test_of_several_best_steps_the_last():
    assert trainer.best_step({2: 3.0, 4: 2.0, 6: 2.0, 8: 4.0}) == 6


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (InstructConfig.make, {"max_steps": -1}, "max_steps is -1; it must be 0 or more"),
        (InstructConfig.make, {"eval_steps": -1}, "eval_steps is -1; it must be 0 or more"),
        (InstructConfig.make, {"keep": "first"}, "keep is 'first'.*last.*best"),
        (InstructConfig.make, {"keep": "best"}, "no perplexity is measured on the way: give eval_steps as well"),
        (Session, {"save_minutes": 0}, "save_minutes is 0; it must be positive"),
        (Session, {"save_minutes": float("nan")}, "save_minutes is nan; it must be positive"),
    ],
)
def test_what_is_out_of_range(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_minutes_between_checkpoints_are_no_setting_of_a_run(capsys):
    assert instruct_main(["--save-minutes=3", "--print-config"]) == 0
    assert "save_minutes" not in capsys.readouterr().out
    assert instruct_main(["--save-minutes=0", "--data=synthetic", "--quiet"]) == 2
    assert "save_minutes is 0.0; it must be positive" in capsys.readouterr().err
