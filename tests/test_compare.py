"""Comparisons: every figure of the table against a plain loop, the real command, and what is refused."""

import copy
import csv
import io
import json
import math
import re

import matplotlib.image
import numpy as np
import pytest
from helpers import FLAGS, answer, refused

from abm_vision.analysis import compare as module
from abm_vision.analysis.compare import records, to_markdown, to_text
from abm_vision.analysis.figures import draw_comparison
from abm_vision.analysis.stats import delayed_training_loss, interval
from abm_vision.runs import run_suite
from abm_vision.runs.folder import Diverged
from abm_vision.vtab import make_config
from abm_vision.vtab.__main__ import main
from abm_vision.vtab.view import VIEW


def compare(runs, diverged=()):
    return module.compare(runs, VIEW, diverged)


def record(
    init="kaiming", lr=1e-3, seed=0, losses=(4, 3, 2, 1), top1=0.5, init_seconds=0.0, task="dsprites_loc", **more
):
    """A result as `compare` reads it: two epochs of two steps, 10 seconds each."""
    config = make_config(task=task, init=init, lr=lr, seed=seed, epochs=2).to_dict()
    loss = {"overall": {"loss": 0.9}}
    return {
        "config": config,
        "loss_per_step": [float(v) for v in losses],
        "seconds_per_epoch": [10.0, 10.0],
        "seconds": {"init": init_seconds, "train": 20.0},
        "test": {"top1": top1},
        "top1_per_epoch": {},
        "data": {"train": {"source": "rendered"}, "test": {"source": "rendered"}},
        "weights": {"sha256": "abc"},
        "reference": None,
        "precision": "bf16",
        "environment": {"device": "a processor"},
        "information_loss": {"before": loss, "after": loss, "after_on_seen": {"overall": {"loss": 0.1}}},
        **more,
    }


def three(init, losses, lr=1e-3, **more):
    """Three seeds with the given mean losses."""
    return [record(init, lr, seed, [a + 1.5, a + 0.5, a - 0.5, a - 1.5], **more) for seed, a in enumerate(losses)]


def test_row_by_hand():
    runs = [*three("kaiming", [2.5, 2.6, 2.7], top1=0.5), *three("eva", [2.0, 2.6, 2.3], init_seconds=5.0, top1=0.6)]
    rows = {row.init: row for row in compare(runs).rows}
    eva = rows["eva"]
    ratios = [2.0 / 2.5, 1.0, 2.3 / 2.7]
    assert eva.loss == pytest.approx(2.3) and eva.loss_error == pytest.approx(0.3 / math.sqrt(3))
    assert eva.loss_ratio == pytest.approx(sum(ratios) / 3) and eva.loss_low < eva.loss_ratio < eva.loss_high
    assert eva.loss_low >= min(ratios) - 1e-9 and eva.loss_high <= max(ratios) + 1e-9
    assert eva.score_gain == pytest.approx(0.1) and eva.score_low == pytest.approx(0.1) == pytest.approx(eva.score_high)
    assert eva.init_epochs == pytest.approx(0.5) and eva.seeds == 3 and eva.source == "rendered"
    # Half an epoch is one of the four steps: the first loss twice, the last one cut off.
    timed = [(2 * (a + 1.5) + a + 0.5 + a - 0.5) / 4 for a in (2.0, 2.6, 2.3)]
    assert eva.timed_ratio == pytest.approx(np.mean([t / a for t, a in zip(timed, (2.5, 2.6, 2.7), strict=True)]))
    # Epoch means: the baseline ends at 2.6 - 1 = 1.6, this one goes from 3.3 to 1.3.
    assert eva.epochs_to == pytest.approx(1 + (3.3 - 1.6) / (3.3 - 1.3))
    assert eva.timed_epochs_to == pytest.approx(eva.epochs_to + 0.5)
    assert (eva.information_loss, eva.seen_loss) == (pytest.approx(0.9), pytest.approx(0.1))
    base = rows["kaiming"]
    assert base.loss_ratio == base.timed_ratio == 1 and base.score_gain == 0 and base.epochs_to == pytest.approx(2)


def test_every_start_at_its_own_best_rate():
    runs = [*three("kaiming", [2.5] * 3, 1e-3), *three("kaiming", [2.2] * 3, 2e-3), *three("eva", [2.4] * 3, 1e-3)]
    runs += three("eva", [2.9] * 3, 2e-3)
    found = compare(runs, [make_config(init="eva", lr=4e-3, epochs=2)])
    assert {row.init: row.lr for row in found.rows} == {"kaiming": 2e-3, "eva": 1e-3}
    assert found.rates["dsprites_loc", "eva"] == {
        1e-3: (pytest.approx(2.4), 0.5),
        2e-3: (pytest.approx(2.9), 0.5),
        4e-3: None,
    }
    assert "diverged" in to_markdown(found) and "2.400, 50.0 %" in to_markdown(found)


def test_never_reached_and_one_seed():
    rows = {r.init: r for r in compare([record(), record("eva", losses=(5, 4, 4, 4))]).rows}
    assert rows["eva"].epochs_to is None and rows["eva"].timed_epochs_to is None
    assert rows["eva"].loss_error is rows["eva"].score_error is None
    text = to_text(compare([record(), record("eva", losses=(5, 4, 4, 4))]))
    assert "never" in text and "nan" not in text and "1 seed\n" in text


@pytest.mark.parametrize("cost", [0, 0.1, 0.25, 1.3, 2, 7])
def test_delayed_training_loss_against_an_integral(cost):
    result = record(losses=(4, 3, 2, 1))
    x = (np.arange(200_000) + 0.5) / 100_000  # two epochs, finely cut
    steps = np.floor((x - cost) * 2).astype(int)
    curve = np.where(x < cost, 4.0, np.array([4.0, 3.0, 2.0, 1.0])[steps.clip(0, 3)])
    assert delayed_training_loss(result, cost) == pytest.approx(curve.mean(), abs=1e-4)


def test_bootstrap_against_all_resamples():
    values = np.array([0.1, 0.5, 0.9])
    means = np.sort([np.mean(c) for c in np.stack(np.meshgrid(*[values] * 3), -1).reshape(-1, 3)])  # all 27
    low, high = interval(values)
    assert (low, high) == interval(values)
    assert means[0] <= low <= means[2] and means[-3] <= high <= means[-1]


def test_axes_of_a_single_epoch():
    """Ticks at whole epochs, and numbers as they are: no offset above an axis."""
    runs = [
        record(init, seed=seed, losses=(2.7712 + 0.0004 * seed, 2.7709), top1=0.5 + 0.001 * seed)
        for init in ("kaiming", "eva")
        for seed in (0, 1)
    ]
    for run in runs:
        run["config"]["epochs"], run["seconds_per_epoch"] = 1, [10.0]
        run["top1_per_epoch"] = {"1": run["test"]["top1"]}
    figure = draw_comparison(compare(runs), "dsprites_loc")
    figure.savefig(io.BytesIO())
    for axes in figure.axes:
        texts = [axis.get_major_formatter().get_offset() for axis in (axes.xaxis, axes.yaxis)]
        assert texts == ["", ""], axes.get_ylabel()
    for axes in (axes for axes in figure.axes if axes.get_xlabel() == "epoch"):
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [0, 1]
    assert [axes.get_xlabel() for axes in figure.axes].count("epoch") == 2


def test_differences_are_those_of_the_table():
    alone = compare(three("kaiming", [2.5] * 3))
    assert not [axes for axes in draw_comparison(alone, "dsprites_loc").axes if "difference" in axes.get_xlabel()]
    runs = [*three("kaiming", [2.5] * 3), *three("eva", [2.0, 2.6, 2.3])]
    for run, top1 in zip(runs, (0.50, 0.60, 0.70, 0.53, 0.61, 0.69), strict=True):
        run["test"] = {"top1": top1}
    found = compare(runs)
    (axes,) = (axes for axes in draw_comparison(found, "dsprites_loc").axes if "difference" in axes.get_xlabel())
    assert axes.get_xlabel() == "test top-1, 95 % interval:\ndifference to kaiming (points)"
    assert [text.get_text() for text in axes.get_yticklabels()] == ["eva\nlr 0.001"]
    row = next(row for row in found.rows if row.init == "eva")
    dots, mark, zero = axes.lines
    assert list(dots.get_xdata()) == pytest.approx([3, 1, -1]) and list(zero.get_xdata()) == [0, 0]
    assert list(mark.get_xdata()) == pytest.approx([100 * row.score_gain])
    (span,) = axes.collections[0].get_segments()
    assert span[:, 0] == pytest.approx((100 * row.score_low, 100 * row.score_high))


@pytest.mark.figures
def test_files(tmp_path):
    found = compare([*three("kaiming", [2.5, 2.6, 2.7]), *three("eva", [2.0, 2.6, 2.3])])
    paths = module.write_files(found, tmp_path / "report")
    assert [p.name for p in paths] == ["compare.md", "compare.csv", "compare.png"]
    rows = list(csv.DictReader(paths[1].open()))
    assert [r["init"] for r in rows] == ["eva", "kaiming"] and float(rows[0]["loss"]) == pytest.approx(2.3)
    assert paths[0].read_text() == to_markdown(found) and "[rendered], 3 seeds" in paths[0].read_text()
    assert [set(row) for row in rows] == [set(row) for row in records(found)] and "top1_gain" in rows[0]
    picture = matplotlib.image.imread(paths[2])
    assert picture.shape[1] == 1020 and picture.std() > 0.05  # 6.8 inches: the width of a page
    both = compare([record(), changed(record(), task="dtd")])
    names = [path.name for path in module.write_files(both, tmp_path / "both")]
    assert names[2:] == ["compare_dsprites_loc.png", "compare_dtd.png"]


# Unequal runs


def changed(result, **settings):
    other = copy.deepcopy(result)
    other["config"].update(settings)
    return other


@pytest.mark.parametrize(
    "other, words",
    [
        (changed(record("eva"), epochs=3), r"epochs \(2, 3\)"),
        (changed(record("eva"), rank=4, alpha=1.0), r"rank \(4, 8\); alpha|alpha.*rank"),
        (record("eva", weights={"sha256": "other"}), r"weights \(abc, other\)"),
        (
            record("eva", data={"train": {"source": "tfds"}, "test": {"source": "tfds"}}),
            r"training data \(rendered, tfds\)",
        ),
        (record("eva", precision="fp32"), "precision"),
        (record("eva", environment={"device": "another"}), r"device \(a processor, another\)"),
    ],
)
def test_unequal_settings_are_refused_by_name(other, words):
    with pytest.raises(ValueError, match=f"differ in more than task, initialisation, rate and seed: .*({words})"):
        compare([record(), other])


def test_starts_may_have_settings_of_their_own():
    compare([record(), changed(record("abm"), abm_steps=7, abm_lr=1.0)])


def test_tasks_may_have_data_of_their_own():
    def of(task, source, **more):
        return changed(record(data=dict.fromkeys(("train", "test"), {"source": source}), **more), task=task)

    compare([of("dsprites_loc", "rendered"), of("dsprites_ori", "tfds")])
    with pytest.raises(ValueError, match="training data"):
        compare([of("dsprites_loc", "rendered"), of("dsprites_loc", "tfds", init="eva")])


def test_reference_whose_cost_is_not_known():
    tuned = record("abm_tuned", reference={"folder": "x", "seconds": None})
    row = next(r for r in compare([record(), tuned]).rows if r.init == "abm_tuned")
    assert row.init_epochs is row.timed_ratio is row.timed_epochs_to is None and row.loss_ratio == 1
    assert to_text(compare([record(), tuned])).count("unknown") == 2
    known = record("abm_tuned", reference={"folder": "x", "seconds": 30.0})
    known["seconds"]["reference"] = 30.0
    assert next(r for r in compare([record(), known]).rows if r.init == "abm_tuned").init_epochs == pytest.approx(3)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([])
    with pytest.raises(ValueError, match="dsprites_loc has no run with init kaiming"):
        compare([record("eva")])
    with pytest.raises(ValueError, match=r"eva on dsprites_loc has seeds \[1\], kaiming has \[0\]"):
        compare([record(), record("eva", seed=1)])
    with pytest.raises(ValueError, match="several runs of one seed"):
        compare([record(), record("abm"), changed(record("abm"), abm_steps=3)])
    with pytest.raises(ValueError, match="eva on dsprites_loc diverged at every learning rate"):
        compare([record()], [make_config(init="eva")])


# Runs


@pytest.mark.slow
def test_what_diverged_is_recorded_and_what_fails_is_an_error(tmp_path, monkeypatch, capsys):
    real, words = run_suite.run, ["compare", *FLAGS[:-4], "--epochs", "1", "--init", "kaiming,gaussian", "--seeds", "1"]
    words = [str(word) for word in (*words, "--lr", "1e-3,2e-3", "--out", tmp_path)]

    def breaks(error):
        def run(harness, config, session):
            if (config.init, config.lr) == ("gaussian", 2e-3):
                raise error
            return real(harness, config, session)

        return run

    monkeypatch.setattr(run_suite, "run", breaks(MemoryError("no memory")))
    assert main(words) == 2
    assert re.search(r"1 of 4 runs failed.*gaussian-seed0-\w+: MemoryError: no memory", capsys.readouterr().err)
    monkeypatch.setattr(run_suite, "run", breaks(Diverged("the training loss is not finite")))
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["init"]: row["seeds"] for row in rows} == {"kaiming": 1, "gaussian": 1}
    assert all(row["information_loss"] > 0.5 for row in rows)
    assert "diverged" in (tmp_path / "compare.md").read_text()


def test_the_command(tmp_path, capsys):
    flags = [*FLAGS[:-4], "--epochs", "1", "--eval-epochs", "1"]
    words = ["compare", *flags, "--init", "kaiming,random_b", "--seeds", "2", "--lr", "1e-3", "--out", tmp_path]
    code, out, err = answer(words, capsys)
    assert (code, err) == (0, "")
    assert "[4/4] dsprites_loc random_b lr 0.001 seed 1: top-1 " in out
    assert re.search(r"dsprites_loc \[rendered\], 2 seeds\ninitialisation +best lr", out)
    assert out.splitlines()[-1] == str(tmp_path / "compare.png")
    folders = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    assert len(folders) == 4
    code, out, err = answer(["compare", *folders, "--json", "--report", tmp_path / "again"], capsys)
    assert (code, err) == (0, "")
    assert {row["init"] for row in json.loads(out)} == {"kaiming", "random_b"}
    assert (tmp_path / "again" / "compare.md").read_text() == (tmp_path / "compare.md").read_text()
    # The folder that they are in says the same, and what it holds besides.
    foreign, failed = tmp_path / "rte-abm", tmp_path / "dtd-abm"
    for folder, name, content in (
        (foreign, "result.json", {"schema": "glue-2"}),
        (failed, "failure.json", {"schema": 6, "reason": "Diverged:\n not finite", "time": ""}),
    ):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_text(json.dumps(content))
    code, out, err = answer(["compare", tmp_path, "--report", tmp_path / "third"], capsys)
    assert code == 0 and (tmp_path / "third" / "compare.md").read_text() == (tmp_path / "compare.md").read_text()
    assert err.splitlines() == [
        "abm-vtab: warning: no result: dtd-abm (Diverged: not finite)",
        "abm-vtab: warning: no result: rte-abm (a result of abm-glue: use abm-glue report)",
    ]
    err = refused(["compare", *folders, foreign], capsys)
    assert "rte-abm/result.json has schema 'glue-2', it is of abm-glue: give it to abm-glue" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--init", "kaiming,pisa"], "init is 'pisa'; allowed are kaiming.*did you mean pissa"),
        (["--seeds", "0"], "seeds is 0; it must be 1 or more"),
        (["--init", "eva"], "init is eva; kaiming, which all others are compared with, must be among them"),
        (["absent", "--lr", "1e-3"], "finished runs have their settings: leave out lr"),
        (["--init", "kaiming,kaiming"], "init is kaiming, kaiming; give one or more, each once"),
        (["--lr", "1e-3,fast"], "lr is '1e-3,fast'; give numbers with commas between"),
        (["--task", "dsprites_lok"], "unknown task 'dsprites_lok'"),
        (["--init", "kaiming,pissa", "--qkv", "qv"], "pissa cannot leave k alone"),
        (["--seed=1"], "unrecognized arguments: --seed=1"),
        (["absent"], r"no result\.json in absent"),
        (["absent", "--rank", "4"], "finished runs have their settings: leave out rank"),
    ],
)
def test_command_refuses(words, message, capsys, tmp_path):
    assert re.search(message, refused(["compare", "--quiet", "--out", tmp_path, *words], capsys))
    assert not list(tmp_path.iterdir())
