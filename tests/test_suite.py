"""The suite: its plan, its protocol, what it survives, and its executors.

Runs are tiny: a ViT with random weights. What a suite's runs give is compared with the same runs made one by one.
"""

import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, full_disk
from helpers import start
from official import BUILDERS, small_edition, write_official

import vtab_tasks
from abm_vision import INITIALIZERS
from abm_vision.runs import checkpoint, executors
from abm_vision.runs import folder as files
from abm_vision.runs import run as spine
from abm_vision.runs import run_suite as module
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Session
from abm_vision.runs.run_suite import Outcome, attempt
from abm_vision.runs.suite import Suite as SuiteOf
from abm_vision.runs.suite import parse_tasks, plan
from abm_vision.vtab import HARNESS, harness, make_config, run
from abm_vision.vtab.__main__ import main
from abm_vision.vtab.planning import estimate
from abm_vision.vtab.view import VIEW

TINY = {**{k: v for k, v in TINY.items() if not k.startswith("abm_")}, "epochs": 1, "source": "rendered"}
WORDS = [word for name, value in TINY.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def Suite(*arguments, **more):
    return SuiteOf(VIEW, *arguments, **more)


def run_suite(suite, out, execute=executors.in_this_process, say=lambda line: None, **how):
    return module.run_suite(suite, Session(out, say=say, **how), execute)


def tiny(tasks=("dsprites_loc",), inits=("kaiming",), seeds=1, **more):
    return Suite(tasks, inits, seeds, TINY, **more)


# ---- what is to be run ---------------------------------------------------------------------------


def test_tasks_by_group_and_name():
    assert parse_tasks("all", VIEW) == tuple(vtab_tasks.TASKS) and len(parse_tasks("all", VIEW)) == 19
    assert len(parse_tasks("structured", VIEW)) == 8 and len(parse_tasks("natural,specialized", VIEW)) == 11
    assert parse_tasks("snorb_azim,cifar100,snorb_azim", VIEW) == ("cifar100", "snorb_azim")
    with pytest.raises(ValueError, match="unknown task 'struktured'"):
        parse_tasks("struktured", VIEW)


def test_final_runs_are_every_task_start_and_seed():
    found = tiny(("dsprites_loc", "snorb_azim"), ("kaiming", "gaussian"), 3).final()
    assert len(found) == len(set(found)) == 12
    assert {c.evaluate for c in found} == {"test"} and {c.seed for c in found} == {0, 1, 2}


def test_selection_is_the_same_grid_for_every_task_and_never_the_test_split():
    grid = {"lr": (1e-3, 2e-3), "weight_decay": (0.0, 0.1)}
    found = tiny(("dsprites_loc", "snorb_azim"), ("kaiming", "gaussian"), 3, grid=grid).selection()
    points = {(c.lr, c.weight_decay) for c in found}
    assert len(found) == 2 * 2 * 4 and points == {(a, b) for a in (1e-3, 2e-3) for b in (0.0, 0.1)}
    assert {c.evaluate for c in found} == {"val"} and {c.seed for c in found} == {0}
    assert tiny().selection() == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tasks": ()}, "task is empty"),
        ({"inits": ("kaiming", "kaiming")}, "init is kaiming, kaiming; give one or more, each once"),
        ({"seeds": 0}, "seeds is 0"),
        ({"grid": {"lr": ()}}, "lr is empty"),
        ({"grid": {"seed": (0, 1)}}, "the suite itself sets seed"),
        ({"grid": {"rank": (4, 8)}}, "rank is set and to be selected"),
        ({"grid": {"lr": (1e-3, -1.0)}}, None),
        ({"inits": ("kaming",)}, "kaiming"),
    ],
)
def test_an_impossible_suite(arguments, message):
    if message is None:  # a bad point is found before anything runs
        with pytest.raises(ValueError, match="lr is -1"):
            tiny(**arguments).selection()
        return
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


# ---- running -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A suite with a selection, and its folder."""
    out = tmp_path_factory.mktemp("suite")
    suite, lines = tiny(("dsprites_loc", "dsprites_ori"), seeds=2, grid={"lr": (1e-5, 5e-3)}), []
    return suite, out, run_suite(suite, out, say=lines.append), lines


def test_a_suite_gives_what_its_runs_give(finished, tmp_path):
    suite, out, outcomes, _ = finished
    assert len(outcomes) == 4 + 4 and {o.state for o in outcomes.values()} == {"done"}
    for config, outcome in outcomes.items():
        result = HARNESS.kept.read(out / config.run_name())
        assert result["test"]["top1"] == outcome.score
        assert result["test"]["split"] == ("val200" if config.evaluate == "val" else "test")
        assert result["test"]["count"] == 60
    config = next(c for c in outcomes if c.evaluate == "test")
    alone = run(config, tmp_path)
    assert alone["loss_per_step"] == HARNESS.kept.read(out / config.run_name())["loss_per_step"]


def test_what_data_hold_is_found_once_for_all_finished_runs(finished, monkeypatch):
    suite, out, outcomes, _ = finished
    found = []
    monkeypatch.setattr(
        harness, "_data_origin", lambda part, data, real=harness._data_origin: found.append(part) or real(part, data)
    )
    again = run_suite(suite, out)
    assert {c: o.score for c, o in again.items()} == {c: o.score for c, o in outcomes.items()}
    assert len(found) == 2 * 2 * 2  # training and test data, of two tasks, for selection and final runs


def test_the_best_of_the_validation_images_is_trained_again(finished):
    suite, _, outcomes, lines = finished
    for task in suite.tasks:
        scores = {c.lr: o.score for c, o in outcomes.items() if c.task == task and c.evaluate == "val"}
        best = max((1e-5, 5e-3), key=lambda lr: scores[lr])
        assert {c.lr for c in outcomes if c.task == task and c.evaluate == "test"} == {best}
        assert any(f"{task} kaiming: selected lr {best}" in line for line in lines)


def test_selection_trains_on_800_and_scores_200(tmp_path):
    config = make_config(**{**TINY, "test_images": 0, "evaluate": "val", "batch_size": 100})
    result = run(config, tmp_path)
    assert len(result["loss_per_step"]) == 8
    assert (result["test"]["count"], result["test"]["split_size"], result["test"]["split"]) == (200, 200, "val200")
    assert [result["data"][k]["split"] for k in ("train", "test")] == ["train800", "val200"]


def test_the_test_split_is_opened_once_after_the_last_epoch(tmp_path, monkeypatch):
    """Images of the test split are read by final runs alone, every one once, and after all training steps."""
    events = []
    read, step = vtab_tasks.TaskData.images, torch.optim.AdamW.step

    def images(self, indices):
        events.extend((self.split, int(i)) for i in self.positions[list(indices)])
        return read(self, indices)

    monkeypatch.setattr(vtab_tasks.TaskData, "images", images)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    run_suite(tiny(grid={"lr": (1e-3, 2e-3)}), tmp_path)
    tested = [k for k, event in enumerate(events) if event[0] == "test"]
    steps = [k for k, event in enumerate(events) if event == "step"]
    assert len(tested) == len({events[k] for k in tested}) == 60
    assert len(steps) == 2 * 4 + 4 and min(tested) > max(steps)  # 800 and 1,000 images in batches of 250
    assert len({event[0] for event in events if event != "step"}) == 4


def test_finished_runs_are_not_repeated(finished, monkeypatch):
    suite, out, outcomes, _ = finished
    monkeypatch.setattr("abm_vision.runs.run._make", lambda *a: pytest.fail("ran again"))
    assert run_suite(suite, out) == outcomes


def test_a_tuned_reference_is_the_run_that_the_suite_has_anyway(tmp_path):
    """Although --abm-steps is given for all: the default initialisation has no use for it."""
    outcomes = run_suite(tiny(inits=("kaiming", "abm_tuned")), tmp_path)
    assert {o.state for o in outcomes.values()} == {"done"} and len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert main(["suite", "--tasks", "dsprites_loc", "--init", "kaiming", "--out", str(tmp_path / "out"), *WORDS]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("jobs", [[], pytest.param(["--jobs", "2"], marks=pytest.mark.slow)])
def test_a_full_disk_stops_the_suite_and_loses_nothing(tmp_path, capsys, monkeypatch, jobs):
    """Nothing could be recorded of any further run, so it stops; checkpoints are some 400 kB here."""
    words = ["suite", "--tasks", "dsprites_loc", "--init", "kaiming,gaussian", "--seeds", "1", "--out", str(tmp_path)]
    assert main([*words[:4], "kaiming", *words[5:], *WORDS]) == 0
    (before,) = tmp_path.glob("*/result.json")
    content = before.read_text()
    capsys.readouterr()
    # New processes inherit the limit, copies of an older one would not.
    monkeypatch.setattr(executors, "_context", lambda harness: multiprocessing.get_context("spawn"))
    with full_disk(100_000):
        assert main([*words, *WORDS, *jobs]) == 2
    shown = capsys.readouterr()
    assert "checkpoint.pt (File too large); free space or choose another place" in shown.err
    assert shown.err.count("\n") == 1 and "1/2" in shown.out
    assert {p.name for p in tmp_path.glob("*gaussian*/*")} <= {"config.json", ".lock"}
    assert before.read_text() == content
    assert main([*words, *WORDS]) == 0 and len(list(tmp_path.glob("*/result.json"))) == 2


@pytest.mark.parametrize(
    "error",
    [
        Diverged("the training loss is not finite in epoch 1"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no memory"),
        OSError("image cut short"),
    ],
)
def test_a_failed_run_is_recorded_and_does_not_stop_the_rest(tmp_path, monkeypatch, capsys, error):
    real = module.run

    def fails(harness, config, session):
        if config.init == "gaussian":
            raise error
        return real(harness, config, session)

    monkeypatch.setattr(module, "run", fails)
    words = ["suite", "--tasks", "dsprites_loc", "--init", "gaussian,kaiming", "--seeds", "1", "--out", str(tmp_path)]
    assert main([*words, *WORDS]) == 1
    shown = capsys.readouterr()
    assert "failed: dsprites_loc-gaussian-seed0-" in shown.err and str(error) in shown.err
    assert "1 run finished, 1 failed" in shown.out
    (failed,) = tmp_path.glob("*gaussian*")
    assert str(error) in json.loads((failed / "failure.json").read_text())["reason"]
    monkeypatch.setattr(module, "run", real)  # put right, it runs, and the failure is forgotten
    assert main([*words, *WORDS]) == 0
    assert not (failed / "failure.json").exists() and (failed / "result.json").exists()


def test_a_selection_that_is_not_whole_chooses_nothing(tmp_path, monkeypatch):
    """A point that failed by chance would come back, and another one might win then."""
    real = module.run

    def fails(harness, config, session):
        if config.evaluate == "val" and config.lr == 2e-3:
            raise MemoryError("no memory")
        return real(harness, config, session)

    monkeypatch.setattr(module, "run", fails)
    lines, suite = [], tiny(grid={"lr": (1e-3, 2e-3)})
    outcomes = run_suite(suite, tmp_path, say=lines.append)
    assert {c.evaluate for c in outcomes} == {"val"} and "1 of 2 runs of the selection failed" in lines[-1]
    monkeypatch.setattr(module, "run", real)
    assert any(c.evaluate == "test" for c in run_suite(suite, tmp_path))


def test_points_that_a_start_has_no_use_for_are_one_run():
    suite = tiny(inits=("kaiming", "abm_aligned"), grid={"align_size": (0.01, 0.02, 0.1)})
    assert [c.init for c in suite.selection()] == ["kaiming", *["abm_aligned"] * 3]
    with pytest.raises(ValueError, match="abm_margin, align_size are given, .* no use for them"):
        Suite(("dsprites_loc",), ("kaiming",), 1, {"abm_margin": 0.3}, {"align_size": (0.01, 0.1)})


def test_settings_without_use_do_not_name_a_run():
    plain, other = (make_config(init="kaiming", **more) for more in ({}, {"abm_steps": 3, "align_norm": 4.0}))
    assert plain.run_name() == other.run_name() != make_config(init="kaiming", lr=1e-3).run_name()
    assert make_config(init="abm", abm_steps=3).run_name() != make_config(init="abm").run_name()
    assert make_config(init="abm_aligned", abm_steps=3).run_name() == make_config(init="abm_aligned").run_name()


def test_a_reference_is_a_result_only_if_it_is_asked_for(tmp_path):
    run_suite(tiny(inits=("abm_tuned",)), tmp_path)
    (reference,) = tmp_path.glob("*kaiming*/result.json")
    assert json.loads(reference.read_text())["reference_only"] is True
    lines = []
    run_suite(tiny(inits=("kaiming", "abm_tuned")), tmp_path, say=lines.append)
    assert json.loads(reference.read_text())["reference_only"] is False
    assert sum("finished before" in line for line in lines) == 1  # and is not trained again


def test_finished_runs_need_no_process(tmp_path):
    outcomes = run_suite(tiny(), tmp_path)

    def nothing(harness, configs, session):
        assert not configs
        return ()

    assert run_suite(tiny(), tmp_path, nothing) == outcomes


def test_whatever_a_run_raises_is_one_line_of_the_record(tmp_path, monkeypatch):
    def breaks(harness, config, session):
        raise TypeError("one\n  two")

    monkeypatch.setattr(module, "run", breaks)
    outcome = attempt(HARNESS, tiny().final()[0], Session(tmp_path))
    assert (outcome.state, outcome.reason) == ("failed", "TypeError: one two")


def test_without_a_finished_selection_there_is_no_final_run(tmp_path, monkeypatch):
    def diverges(harness, config, session):
        raise Diverged("not finite")

    monkeypatch.setattr(module, "run", diverges)
    lines = []
    outcomes = run_suite(tiny(grid={"lr": (1.0, 2.0)}), tmp_path, say=lines.append)
    assert {c.evaluate for c in outcomes} == {"val"} and "has diverged, so there is no final run" in lines[-1]


def test_a_run_that_another_process_is_at_is_waited_for(tmp_path, monkeypatch):
    config = tiny().final()[0]
    lock = files.locked(files.open_folder(tmp_path, config))
    lock.__enter__()
    assert attempt(HARNESS, config, Session(tmp_path)) == Outcome("busy")
    with pytest.raises(files.Busy, match="another process is at the run"):
        run(config, tmp_path)
    monkeypatch.setattr(module, "WAIT", 0.0)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: lock.__exit__(None, None, None))
    lines = []
    outcomes = run_suite(tiny(), tmp_path, say=lines.append)
    assert outcomes[config].state == "done" and "waiting for 1 run of another process" in lines[0]


def _work(out, events):
    """Another process with the same suite, which tells of the runs that it trains."""
    real = spine._make

    def reported(harness, run):
        events.put((os.getpid(), run.config.run_name()))
        return real(harness, run)

    spine._make = reported
    module.WAIT = 0.2
    torch.set_num_threads(1)
    run_suite(tiny(inits=("kaiming", "gaussian"), seeds=2), out)


@pytest.mark.slow
def test_two_suites_on_one_folder_share_the_work(tmp_path):
    context = executors._context(HARNESS)
    events = context.Queue()
    both = [context.Process(target=_work, args=(tmp_path, events)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(240)
        assert process.exitcode == 0
    trained = [events.get(timeout=5)[1] for _ in range(4)]
    assert len(set(trained)) == 4 and events.empty()


def _endless(out):
    torch.set_num_threads(1)
    suite = Suite(("dsprites_loc",), ("kaiming",), 1, {**TINY, "epochs": 400})
    run_suite(suite, out)


@pytest.mark.slow
def test_kill_9_loses_at_most_the_running_epoch(tmp_path):
    process = executors._context(HARNESS).Process(target=_endless, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.glob("*/checkpoint.pt")):
            assert time.monotonic() < deadline and process.is_alive()
            time.sleep(0.1)
    finally:
        process.kill()
        process.join()
    (folder,) = tmp_path.glob("*/")
    state = checkpoint._read(folder / "checkpoint.pt", torch.device("cpu"), schema=6)
    assert 1 <= state["progress"]["epoch"] < 400 and not (folder / "result.json").exists()
    with files.locked(folder):  # the system has given it back
        pass


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_no_process_outlives_a_suite(tmp_path, how, code):
    """Ctrl-C goes to all processes of a terminal, the others to the suite's own."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    words = ["suite", "--tasks", "dsprites_loc", "--init", "kaiming,gaussian", "--jobs", "2", "--out", str(tmp_path)]
    process = start(*words, *WORDS, "--epochs", "5000", start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while len(list(tmp_path.glob("*/checkpoint.pt"))) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
        err = process.communicate(timeout=60)[1]  # ends when the last process has closed it
    finally:
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code and "Traceback" not in err
    assert ("resumes from its last checkpoint" in err) is (how != signal.SIGKILL)
    for folder in tmp_path.glob("*/"):
        assert not files.is_locked(folder) and not (folder / "result.json").exists()


# ---- plan ----------------------------------------------------------------------------------------


def test_plan_counts_what_is_left(finished):
    suite, out, _, _ = finished
    planned = plan(Suite(suite.tasks, ("kaiming", "gaussian"), 2, TINY), out)
    # Its final runs had another rate than the default, so none of these is finished.
    assert len(planned) == 8 and {p.state for p in planned} == {"to run"}
    again = plan(suite, out)
    assert [p.state for p in again[:4]] == ["finished"] * 4 and all(p.is_settled for p in again[:4])


def test_time_is_estimated_from_finished_runs(finished, tmp_path):
    (_, out, outcomes, _), config = finished, make_config(**TINY, task="dsprites_loc")
    seconds, origin = estimate(config, out)
    found = [HARNESS.kept.read(out / c.run_name()) for c in outcomes]
    train, test = (statistics.median(r["images_per_second"][k] for r in found) for k in ("train", "test"))
    before = statistics.median(sum(r["seconds"][k] for k in ("data", "weights", "lora", "init")) for r in found)
    assert seconds(config) == pytest.approx(before + 1000 / train + 60 / test) and f"finished runs in {out}" in origin


def test_dry_run(finished, tmp_path, capsys):
    _, out, outcomes, _ = finished
    finals = {c.lr for c in outcomes if c.evaluate == "test" and c.task == "dsprites_loc"}
    there = 2 + (1e-5 in finals)  # a plan has final runs with the grid's first rate
    words = ["suite", "--tasks", "dsprites_loc,snorb_elev", "--init", "kaiming", "--grid", "lr=1e-5,5e-3", "--dry-run"]
    empty = tmp_path / "empty"
    for folder, origin in ((out, f"finished runs in {out}"), (empty, "one epoch of dsprites_loc just now")):
        assert main([*words, *WORDS, "--out", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert shown.count("selection") == 4 and shown.count(" final ") == 2 and origin in shown
        assert f"6 runs, {there if folder == out else 0} finished" in shown
    assert not empty.exists()


def test_a_result_that_is_damaged_takes_nothing_with_it(finished, tmp_path, capsys):
    """It is a failed run of the suite, and a line of the plan."""
    suite, out, _, _ = finished
    shutil.copytree(out, tmp_path / "out")
    path = next((tmp_path / "out").glob("*/result.json"))
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "test": {**content["test"], "top1": 2.0}}))
    lines = []
    outcomes = run_suite(suite, tmp_path / "out", say=lines.append)
    (failed,) = [o for o in outcomes.values() if o.state == "failed"]
    assert "test.top1 is 2.0" in failed.reason and sum(o.state == "done" for o in outcomes.values()) >= 3
    words = ["suite", "--tasks", ",".join(suite.tasks), "--init", "kaiming", "--seeds", "2", "--grid", "lr=1e-5,5e-3"]
    assert main([*words, *WORDS, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr()
    assert shown.out.count("not readable") == 1 and "test.top1 is 2.0" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "cifar"], "unknown task 'cifar'; did you mean cifar100"),
        (["--init", "abm,kayming"], "kaiming"),
        (["--seeds", "0"], "seeds is 0"),
        (["--grid", "lr"], "is not SETTING=A,B"),
        (["--grid", "lr=fast"], "lr takes values of type float"),
        (["--grid", "speed=1,2"], "is not SETTING=A,B"),
        (["--jobs", "0"], "jobs is 0; it must be 1 to"),
        (["--grid", "lr=1e-3", "--grid", "lr=2e-3,4e-3"], "--grid names lr twice"),
        (["--abm-reference", "somewhere"], "abm_reference is given, but init abm, kaiming has no use for it"),
        (["--executor", "ray", "--jobs", "2"], "--jobs is not for --executor ray"),
        (["--gpus-per-run", "0.5"], "--gpus-per-run is not for --executor local"),
        (["--task", "dsprites_loc"], "unrecognized arguments: --task"),
    ],
)
def test_bad_words(tmp_path, capsys, words, message):
    try:
        code = main(["suite", "--out", str(tmp_path), *WORDS, *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


# ---- executors -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_give_the_same(tmp_path):
    suite = tiny(inits=("kaiming", "gaussian"))
    found = run_suite(suite, tmp_path / "two", executors.local(min(2, os.cpu_count())))
    alone = run_suite(suite, tmp_path / "one")
    assert {c: o.score for c, o in found.items()} == {c: o.score for c, o in alone.items()}


@pytest.mark.slow
def test_processes_may_have_loader_processes(tmp_path):
    suite = Suite(("dsprites_loc",), ("kaiming",), 1, {**TINY, "workers": 1})
    (outcome,) = run_suite(suite, tmp_path, executors.local(1)).values()
    assert outcome.state == "done", outcome.reason


@pytest.mark.slow
def test_processes_have_the_environment_of_now(monkeypatch):
    found = []
    for value in ("first", "second"):
        monkeypatch.setenv("ABM_OF_NOW", value)
        context, ask = executors._context(HARNESS), functools.partial(os.getenv, "ABM_OF_NOW")
        found.append(executors._in_child(context, ask, 1, None, set(), Event()))
    assert found == ["first", "second"]


def test_gpus_are_those_of_the_mask(monkeypatch):
    monkeypatch.setattr(executors.torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert executors._gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    assert executors._gpus() == ["2", "GPU-5f"]


def test_one_gpu_for_all_jobs_is_refused(tmp_path):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core")
    with pytest.raises(ValueError, match="device is cuda:1 for every run, but 2 jobs share the GPUs out"):
        list(executors.local(2)(HARNESS, [SimpleNamespace(device="cuda:1")], Session(tmp_path)))


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_run(tmp_path):
    suite = Suite(("dsprites_loc",), ("kaiming",), 1, {**TINY, "epochs": 5000})
    execute = executors.local(1)

    def killing(harness, configs, session):
        from threading import Thread

        Thread(target=_kill_the_child, args=(tmp_path,), daemon=True).start()
        return execute(harness, configs, session)

    (outcome,) = run_suite(suite, tmp_path, killing).values()
    assert outcome.state == "failed" and "signal 9, perhaps out of memory" in outcome.reason
    (folder,) = tmp_path.glob("*/")
    assert (folder / "checkpoint.pt").exists() and (folder / "failure.json").exists()


def _kill_the_child(out: Path) -> None:
    while not list(out.glob("*/checkpoint.pt")):
        time.sleep(0.1)
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


@pytest.mark.checkout
@pytest.mark.slow
def test_ray_with_a_node_that_dies(tmp_path, monkeypatch):
    """Two nodes; the one at work is killed in the middle of a run, which the other takes up. Same results as alone.

    One initialisation is of the user's own, in a module that every node must find.
    """
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    examples = str(Path(__file__).parent.parent / "examples")
    monkeypatch.syspath_prepend(examples)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([examples, os.environ.get("PYTHONPATH", "")]))
    words = ["suite", "--tasks=dsprites_loc", "--init=kaiming,noise", "--plugin=noise", *WORDS, "--epochs=8"]
    # Ray is to find out soon that a node is lost, and to take no busy one for a lost one.
    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "_system_config": quick})
    try:
        lost, _ = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
        ray.init(address=cluster.address, log_to_driver=False)
        cluster.wait_for_nodes()
        from threading import Thread

        def kill():
            while not list((tmp_path / "ray").glob("*/checkpoint.pt")):
                time.sleep(0.1)
            cluster.remove_node(lost, allow_graceful=False)

        killer = Thread(target=kill, daemon=True)
        killer.start()
        assert main([*words, "--executor", "ray", "--out", str(tmp_path / "ray")]) == 0
        killer.join(60)
        with pytest.raises(
            ValueError, match="a run is to take 64 CPU and 0 GPU, and no node of the Ray cluster has as much"
        ):
            executors.on_ray(cpus=64)
    finally:
        ray.shutdown()
        cluster.shutdown()
    try:
        assert main([*words, "--out", str(tmp_path / "alone")]) == 0
    finally:
        INITIALIZERS.pop("noise"), sys.modules.pop("noise")
    far, near = (
        {path.parent.name: json.loads(path.read_text())["test"] for path in (tmp_path / name).glob("*/result.json")}
        for name in ("ray", "alone")
    )
    assert far == near and len(far) == 2


def test_ray_is_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[ray\]"'):
        executors.on_ray()


# ---- all of VTAB ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_19_tasks_from_official_data(tmp_path, monkeypatch):
    """The whole suite on small datasets that the official builders have written, 16 of them."""
    for name, task in list(vtab_tasks.TASKS.items()):
        monkeypatch.setitem(vtab_tasks.TASKS, name, small_edition(task))
    for name in BUILDERS:
        write_official(name, tmp_path / "tfds")
    settings = {**TINY, "source": "tfds", "data_dir": str(tmp_path / "tfds"), "batch_size": 6, "test_images": 0}
    suite = Suite(parse_tasks("all", VIEW), ("abm",), 1, settings)
    outcomes = run_suite(suite, tmp_path / "out")
    assert len(outcomes) == 19 and {o.state for o in outcomes.values()} == {"done"}, outcomes
    for config in outcomes:
        result = HARNESS.kept.read(tmp_path / "out" / config.run_name())
        assert result["data"]["test"]["source"] == "tfds" and result["test"]["count"] == 9
        assert result["num_classes"] == vtab_tasks.get_task(config.task).num_classes
