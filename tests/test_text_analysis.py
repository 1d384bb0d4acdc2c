"""Suites, comparisons and reports of runs on text: the same commands as for images, scores of another kind."""

import copy
import csv
import json
import pickle
import shutil
from pkgutil import resolve_name

import pytest
from helpers import GLUE, answer

from abm_vision.analysis.compare import compare, records, to_text
from abm_vision.analysis.report import collect, notes, to_csv, to_html, to_latex, to_markdown
from abm_vision.tune.view import VIEW as TUNE
from abm_vision.vtab.view import VIEW as VTAB
from nlp_ext.glue.__main__ import main as glue
from nlp_ext.glue.tasks import TASKS
from nlp_ext.glue.view import VIEW as GLUE_VIEW
from nlp_ext.glue.view import value
from nlp_ext.instruct.__main__ import main as instruct
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.instruct.view import VIEW


@pytest.fixture(scope="module")
def runs(t5, tmp_path_factory):
    """Four real runs, made by the command, and what it printed."""
    out = tmp_path_factory.mktemp("glue")
    settings = {k: v for k, v in GLUE.items() if k not in ("task", "abm_samples", "abm_steps")}
    settings |= {"model": t5, "epochs": 1, "targets": "q", "batch_size": 64}
    settings["train_examples"] = 200  # diagnosing needs some that the initialisation would not see
    flags = [str(word) for k, v in settings.items() for word in (f"--{k.replace('_', '-')}", v)]
    return out, flags


@pytest.fixture(scope="module")
def compared(runs):
    out, flags = runs
    words = ["--init", "kaiming,gaussian", "--lr", "1e-3", "--seeds", "2", "--out", str(out)]
    assert glue(["compare", "--task", "rte", *flags, *words]) == 0
    return out


@pytest.mark.slow
def test_glue_is_compared(compared):
    results = [json.loads(path.read_text()) for path in sorted(compared.glob("*/result.json"))]
    assert len(results) == 4 and all(r["information_loss"] for r in results)
    rows = {row["init"]: row for row in csv.DictReader((compared / "compare.csv").open())}
    table = (compared / "compare.md").read_text()
    for init in ("kaiming", "gaussian"):
        mine = [r for r in results if r["config"]["init"] == init]
        accuracy = [r["scores"]["validation"]["accuracy"] for r in mine]
        assert float(rows[init]["score"]) == pytest.approx(sum(accuracy) / 2)
        losses = [sum(r["loss_per_step"]) / len(r["loss_per_step"]) for r in mine]
        assert float(rows[init]["loss"]) == pytest.approx(sum(losses) / 2)
    assert "rte [synthetic], 2 seeds" in table and "validation score (%)" in table
    assert (compared / "compare.png").stat().st_size > 10_000


@pytest.mark.slow
def test_glue_is_reported(compared, tmp_path, capsys):
    code, out, _ = answer(["report", compared, "--out", tmp_path], capsys, glue)
    assert code == 0 and "## Stand-ins (not GLUE), validation score in %" in out and "mean of the 9 tasks" in out
    assert {path.name for path in tmp_path.iterdir()} == {f"report.{kind}" for kind in ("md", "csv", "tex", "html")}
    rows = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert len(rows) == 4 and {row["metric"] for row in rows} == {"accuracy"} and rows[0]["group"] == "inference"
    page = (tmp_path / "report.html").read_text()
    assert "<title>GLUE report</title>" in page and "published" not in page.replace("nothing published", "")
    # 12 of the 400 examples of the small grammar were scored.
    assert "† fewer examples than the validation split has" in out and (rows[0]["count"], rows[0]["split_size"]) == (
        "12",
        "400",
    )


@pytest.mark.slow
def test_a_suite_goes_with_the_comparison(runs, compared, tmp_path, capsys):
    """Its runs are those of the comparison, and one more."""
    out, flags = shutil.copytree(compared, tmp_path / "suite"), runs[1]
    words = ["suite", "--tasks", "rte", *flags, "--lr", "1e-3", "--init", "kaiming,pissa", "--out", out]
    code, shown, err = answer([*words, "--dry-run"], capsys, glue)
    assert code == 0 and "2 runs, 1 finished" in shown and err == ""
    code, shown, err = answer([*words, "--executor", "local", "--jobs", "1"], capsys, glue)
    assert code == 0 and err == "" and "[2/2] rte pissa lr 0.001 seed 0: score " in shown
    assert "2 runs finished, 0 failed" in shown


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (glue, ["suite", "--tasks", "rte", "--grid", "lr=1e-3,2e-3"], "GLUE has no samples to choose settings on"),
        (instruct, ["suite", "--grid", "lr=1e-3,2e-3"], "Instruction tuning has no samples to choose settings on"),
        (glue, ["suite", "--tasks", "rtf"], "unknown task 'rtf'"),
        (instruct, ["suite", "--tasks", "rte"], "unrecognized arguments: --tasks"),
        (glue, ["compare", "--init", "abm"], "kaiming, which all others are compared with, must be among them"),
        (instruct, ["compare", "absent"], "no result.json in absent"),
        (glue, ["report", "absent"], "no finished run below absent"),
    ],
)
def test_refusals(tmp_path, monkeypatch, capsys, command, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, err = answer(words, capsys, command)
    assert code == 2 and message in err and "Traceback" not in err and not list(tmp_path.iterdir())


def test_a_result_of_the_vision_harness(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    for name in ("config.json", "result.json"):
        (tmp_path / "run" / name).write_text('{"schema": 6}')
    code, _, err = answer(["report", tmp_path], capsys, glue)
    assert code == 2 and err.endswith("; run is a result of abm-vtab: use abm-vtab report\n")


@pytest.mark.parametrize("view", [GLUE_VIEW, VIEW, VTAB, TUNE])
def test_a_harness_can_be_sent_to_another_process(view):
    if view in (GLUE_VIEW, VIEW):
        pytest.importorskip("datasets", reason="datasets is not installed")
        pytest.importorskip("trl", reason="trl is not installed")
    harness = resolve_name(view.harness)
    assert pickle.loads(pickle.dumps(harness)).kept.config is harness.kept.config
    assert harness.kept is view.kept


def test_every_task_of_glue_is_in_one_group():
    assert set(GLUE_VIEW.groups) == set(TASKS)


def test_the_score_of_a_task_is_its_first_metric_over_its_splits():
    mnli = {"validation_matched": {"accuracy": 0.5, "count": 1}, "validation_mismatched": {"accuracy": 0.7, "count": 1}}
    assert value({"config": {"task": "mnli"}, "scores": mnli}) == pytest.approx(0.6)
    mrpc = {"validation": {"f1": 0.9, "accuracy": 0.8, "count": 1}}
    assert value({"config": {"task": "mrpc"}, "scores": mrpc}) == 0.9


# ---- a score of which less is better -------------------------------------------------------------


def tuned(init, after, seed=0, **more):
    """A result of instruction tuning as `compare` reads it."""
    part = {"source": "synthetic"}
    return {
        "config": InstructConfig.make(init=init, seed=seed, epochs=2).to_dict(),
        "loss_per_step": [4.0, 3.0, 2.0, 1.0],
        "seconds_per_epoch": [10.0, 10.0],
        "seconds": {"init": 0.0, "train": 20.0},
        "perplexity": {"before": 9.0, "after": after, "conversations": 5},
        "data": {"train": part, "held_out": part},
        "weights": {"sha256": "abc"},
        "origin": {"instruction data": "sha256 d", "encoding": "e", "initialisation": init, "tokens": f"of {seed}"},
        "reference": None,
        "precision": "fp32",
        "processes": 1,
        "tiny": True,
        "environment": {"device": "a processor", "commit": None},
        "information_loss": None,
        **more,
    }


def test_less_perplexity_is_better():
    found = compare([*(tuned("kaiming", 3.0, s) for s in (0, 1)), *(tuned("abm", 2.5 + s, s) for s in (0, 1))], VIEW)
    row = next(row for row in records(found) if row["init"] == "abm")
    assert row["perplexity"] == 3.0 and row["perplexity_gain"] == 0.0 and row["perplexity_low"] == pytest.approx(-0.5)
    text = to_text(found)
    assert "difference (less is better)" in text and "gain" not in text and "instruct [synthetic], 2 seeds" in text


def test_runs_of_other_processes_or_data_are_not_compared():
    with pytest.raises(ValueError, match=r"processes \(1, 2\)"):
        compare([tuned("kaiming", 3.0), tuned("abm", 2.5, processes=2)], VIEW)
    other = tuned("abm", 2.5)
    with pytest.raises(ValueError, match=r"instruction data \(sha256 d, sha256 x\)"):
        compare([tuned("kaiming", 3.0), {**other, "origin": {**other["origin"], "instruction data": "sha256 x"}}], VIEW)


def test_instructions_are_reported(tmp_path, monkeypatch):
    results = {"a": tuned("kaiming", 3.0), "b": tuned("abm", 2.5), "c": tuned("eva", 4.0)}
    for name in results:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setattr(type(VIEW.kept), "read", lambda kept, folder: copy.deepcopy(results[folder.name]))
    report = collect(tmp_path, VIEW)
    assert {p.method: (p.better, p.worse) for p in report.sections[0].paired()} == {"abm": (1, 0), "eva": (0, 1)}
    text = to_markdown(report)
    assert "## Instruction tuning on stand-ins, held-out perplexity\n" in text and "2.50" in text
    assert not any("without" in line for line in notes(report)) and "\\midrule\n\\bottomrule" not in to_latex(report)
    assert (
        to_csv(report)
        .splitlines()[0]
        .startswith("task,group,method,init,lr,seed,source,perplexity,before,conversations")
    )
    assert "<title>Instruction tuning report</title>" in to_html(report)
