"""Before a suite: are its data there, and can its runs be made?"""

import json
import shutil

import pytest
from conftest import TINY
from helpers import answer, refused, small_glue

import vtab_tasks
from abm_vision.runs import executors
from abm_vision.runs import run as spine
from abm_vision.runs.harness import Session
from abm_vision.runs.run_suite import run_suite
from abm_vision.runs.suite import Suite
from abm_vision.tune import __main__ as tune
from abm_vision.vtab import harness, make_config
from abm_vision.vtab.config import HANDFUL
from abm_vision.vtab.view import VIEW
from nlp_ext.glue import __main__ as glue
from nlp_ext.instruct import __main__ as instruct
from nlp_ext.instruct.view import VIEW as INSTRUCT

SETTINGS = {**{k: v for k, v in TINY.items() if not k.startswith("abm_")}, "epochs": 7, "warmup": 0.5}
WORDS = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", value)]
NATURAL = tuple(task.name for task in vtab_tasks.TASKS.values() if task.group == "natural")


@pytest.fixture
def results(monkeypatch):
    """The results that runs write, in their order."""
    found, write = [], spine.write_json
    monkeypatch.setattr(spine, "write_json", lambda path, value: found.append(value) or write(path, value))
    return found


# ---- one step of every run -----------------------------------------------------------------------


def test_smoke_is_one_step_of_every_run_and_leaves_nothing(results, tmp_path, capsys):
    words = ["--tasks", "dsprites_loc,dsprites_ori", "--init", "kaiming", "--seeds", 3, "--grid", "lr=1e-3,2e-3"]
    code, out, err = answer(["suite", *words, *WORDS, "--smoke", "--diagnose", "--out", tmp_path / "out"], capsys)
    assert (code, err) == (0, "") and out.endswith("4 runs of one step can be made, 0 cannot; nothing is kept\n")
    made = [tuple(r["config"][name] for name in ("evaluate", "task", "seed", "lr")) for r in results]
    tasks = ("dsprites_loc", "dsprites_ori")
    assert made == [(split, task, 0, 1e-3) for split in ("val", "test") for task in tasks]
    for result in results:
        assert len(result["loss_per_step"]) == 1 and result["config"]["rank"] == TINY["rank"]
        assert result["data"]["train"]["images"] == result["test"]["count"] == HANDFUL
    assert list((tmp_path / "out").iterdir()) == []


def test_smoke_says_which_runs_cannot_be_made(monkeypatch, tmp_path, capsys):
    prepare = harness.SMOKE.prepare

    def broken(run):
        if run.config.task == "dsprites_ori":
            raise ValueError("list.txt:3: image.jpg cannot be read")
        return prepare(run)

    monkeypatch.setattr(harness, "SMOKE", harness.replace(harness.SMOKE, prepare=broken))
    words = ["--tasks", "dsprites_loc,dsprites_ori", "--init", "kaiming", "--smoke", "--quiet", *WORDS]
    code, out, err = answer(["suite", *words, "--out", tmp_path], capsys)
    assert (code, out) == (1, "") and err.count("\n") == 1
    assert err.startswith("failed: dsprites_ori-kaiming-seed0-") and "list.txt:3: image.jpg cannot be read" in err
    assert list(tmp_path.iterdir()) == []


def test_smoke_and_a_plan_exclude_each_other(capsys):
    assert "not allowed with argument" in refused(["suite", "--smoke", "--dry-run"], capsys)


@pytest.mark.slow
def test_smoke_in_other_processes(tmp_path):
    suite = Suite(VIEW, ("dsprites_loc",), ("kaiming",), 3, SETTINGS).smoke()
    (outcome,) = run_suite(suite, Session(tmp_path), executors.local(1)).values()
    assert outcome.state == "done", outcome.reason
    (path,) = tmp_path.glob("*/result.json")
    assert len(json.loads(path.read_text())["loss_per_step"]) == 1


@pytest.mark.slow
def test_smoke_of_text(results, t5, tmp_path, capsys):
    settings = small_glue(t5).to_dict()
    flags = [f"--{n.replace('_', '-')}={settings[n]}" for n in ("model", "data", "rank", "precision")]
    words = ["suite", "--smoke", "--tasks", "rte,mnli", "--init", "kaiming,abm", "--out", tmp_path, *flags]
    code, out, err = answer(words, capsys, glue.main)
    assert code == 0, err
    assert "4 runs of one step can be made, 0 cannot" in out and list(tmp_path.iterdir()) == []
    assert all(len(r["loss_per_step"]) == 1 and r["data"]["train"]["examples"] == 8 for r in results)


@pytest.mark.slow
def test_smoke_of_instructions(results, tmp_path, capsys, monkeypatch):
    from nlp_ext import tiny

    tiny.make_model("tiny-llama").save_pretrained(tmp_path / "llama")
    tiny.ByT5Tokenizer().save_pretrained(tmp_path / "llama")
    words = ["suite", "--smoke", "--init", "kaiming,abm", "--model", tmp_path / "llama", "--data", "synthetic"]
    code, out, err = answer([*words, "--out", tmp_path / "out"], capsys, instruct.main)
    assert code == 0, err
    assert "2 runs of one step can be made, 0 cannot" in out and list((tmp_path / "out").iterdir()) == []
    assert all(len(r["loss_per_step"]) == 1 for r in results)
    assert INSTRUCT.smoke.settings.items() <= results[0]["config"].items()


# ---- the data, before any run --------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["--smoke"], ["--grid", "lr=1e-3,2e-3"]])
def test_a_suite_without_its_data_is_one_message(more, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(executors, "attempt", None)  # nothing is tried
    (tmp_path / "data").mkdir()
    words = ["--tasks", "natural,dsprites_loc", "--seeds", 3, "--data-dir", tmp_path / "data"]
    err = refused(["suite", *words, *more, *WORDS, "--out", tmp_path / "out"], capsys)
    assert err.count("\n") == 1 and err.count("Looked for") == 1
    names, first = ", ".join((*NATURAL, "dsprites_loc")), NATURAL[0]
    assert f"no run is made, as the data of {names} cannot be read. {first}: no data for {first} in" in err
    assert not list((tmp_path / "out").glob("**/config.json"))


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (glue.main, ["suite", "--tasks", "rte,sst2"], "the data of rte, sst2 cannot be read. rte: "),
        (instruct.main, ["suite"], "the data of instruct cannot be read. instruct: "),
        (glue.main, ["compare", "--task", "rte"], "the data of rte cannot be read. rte: "),
        (tune.main, ["suite", "--seeds", "2"], "cannot be read. "),
    ],
)
def test_data_of_other_harnesses_that_are_not_there(command, words, message, monkeypatch, tmp_path, capsys):
    if command is not tune.main:
        pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr(executors, "attempt", None)
    data = tmp_path / ("absent.jsonl" if command is instruct.main else "absent")
    code, _, err = answer([*words, "--data", data, "--out", tmp_path / "out"], capsys, command)
    assert code == 2 and message in err and str(data) in err and err.count("\n") == 1


def test_finished_runs_need_no_data(vit_run, monkeypatch, tmp_path, capsys):
    config, out, _ = vit_run
    shutil.copytree(out, tmp_path / "out")
    settings = {n: v for n, v in config.to_dict().items() if v != make_config(init="abm").to_dict()[n]}
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in settings.items() if n not in VIEW.set_by_suite]

    def gone(config, part):
        raise FileNotFoundError(f"no {part} data")

    monkeypatch.setattr(harness, "_load", gone)
    words = ["suite", "--tasks", config.task, "--init", "abm", *flags, "--out", tmp_path / "out"]
    code, out, err = answer(words, capsys)
    assert code == 0 and "1 run finished, 0 failed" in out and "no training data" in err
    words[4] = "abm,kaiming"
    assert f"the data of {config.task} cannot be read. {config.task}: no training data" in refused(words, capsys)
    assert json.loads(next((tmp_path / "out").glob("*/result.json")).read_text())["config"]["init"] == "abm"
