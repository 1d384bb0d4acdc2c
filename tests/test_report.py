"""The report of a folder: averages against hand-computed ones, what is never averaged, and the page in a browser."""

import copy
import csv
import html.parser
import io
import itertools
import json
import re
import shutil
import urllib.parse

import matplotlib.image
import numpy as np
import pytest
from conftest import TINY

import vtab_tasks
from abm_vision import vtab
from abm_vision.analysis import figures
from abm_vision.analysis import report as module
from abm_vision.analysis.compare import compare
from abm_vision.analysis.published import PUBLISHED
from abm_vision.analysis.report import notes, published_means, to_csv, to_html, to_latex, to_markdown, write_files
from abm_vision.drawing import BLUE, GREY, ORANGE, style_of
from abm_vision.initializers import INITIALIZERS
from abm_vision.runs.figures import draw_training
from abm_vision.runs.markup import latex, one_line
from abm_vision.vtab import make_config
from abm_vision.vtab.__main__ import main
from abm_vision.vtab.view import VIEW

TINY = {**{k: v for k, v in TINY.items() if not k.startswith("abm_")}, "epochs": 1, "source": "rendered"}


@pytest.fixture(scope="module")
def real_run(tmp_path_factory):
    """One result of a real run, that the others are made of."""
    out = tmp_path_factory.mktemp("one")
    result = vtab.run(make_config(**TINY, task="dsprites_loc", init="kaiming"), out, diagnose=True)
    return {name: value for name, value in result.items() if name != "folder"}


def collect(folder):
    return module.collect(folder, VIEW)


@pytest.fixture
def put(tmp_path, real_run):
    """Write a result that says what it is told to."""
    count = itertools.count()

    def write(task, init="kaiming", seed=0, top1=0.5, source="tfds", whole=True, losses=None, **config):
        result = copy.deepcopy(real_run)
        result["config"] |= {"task": task, "init": init, "seed": seed, **dict(make_config(init=init).own), **config}
        result["seconds_per_epoch"] *= result["config"]["epochs"]
        size = vtab_tasks.get_task(task).size("test")
        counted = size if whole else 60
        result["test"] |= {"top1": top1, "correct": round(top1 * counted), "count": counted, "split_size": size}
        for part in result["data"].values():
            part |= {"task": task, "source": source}
        result["data"]["test"]["images"] = counted
        if losses:
            result["loss_per_step"] = losses
        folder = tmp_path / "runs" / f"run{next(count)}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"schema": result["schema"], "config": result["config"]}))
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return write


@pytest.fixture
def whole(put, tmp_path):
    """All 19 tasks, two starts, two seeds, known numbers."""
    for k, task in enumerate(vtab_tasks.TASKS):
        for seed in (0, 1):
            put(task, "kaiming", seed, 0.40 + 0.01 * k + 0.02 * seed)
            put(task, "abm", seed, 0.40 + 0.01 * k + 0.02 * seed + (0.03 if k % 2 else -0.01))
    return tmp_path / "runs"


def test_averages_by_hand(whole):
    (section,) = collect(whole).sections
    assert section.kind.name == "real" and section.methods == ("kaiming", "abm") and len(section.tasks) == 19
    natural, specialized, structured, m19, m3 = section.averages("kaiming")
    expected = [41 + np.mean(range(7)), 41 + np.mean(range(7, 11)), 41 + np.mean(range(11, 19))]
    assert [natural.value, specialized.value, structured.value] == pytest.approx(expected)
    assert m19.value == pytest.approx(41 + 9) and m3.value == pytest.approx(np.mean(expected))
    assert m19.std == pytest.approx(np.std([49, 51], ddof=1))  # of the means of seeds
    assert str(m19) == "50.0 ± 1.4" and section.missing("kaiming") == []
    assert m3.std == pytest.approx(np.std([-1, 1], ddof=1))  # every group's mean is 2 points higher with seed 1


def test_a_cell_is_mean_and_standard_deviation_over_seeds(put, tmp_path):
    for seed, top1 in enumerate((0.5, 0.52, 0.57)):
        put("dtd", seed=seed, top1=top1)
    put("pets", top1=0.9)
    (section,) = collect(tmp_path / "runs").sections
    assert str(section.cells["dtd", "kaiming"]) == "53.0 ± 3.6" and str(section.cells["pets", "kaiming"]) == "90.0"
    assert section.cells["dtd", "kaiming"].files == [f"run{k}/result.json" for k in range(3)]


def test_a_part_is_never_shown_as_the_whole(put, tmp_path):
    for k, task in enumerate(list(vtab_tasks.TASKS)[:5]):
        put(task, top1=0.1 * k)
    report = collect(tmp_path / "runs")
    natural, specialized, _, m19, m3 = report.sections[0].averages("kaiming")
    assert str(natural) == "20.0 (5 of 7)" and str(specialized) == "– (0 of 4)"
    assert str(m19) == str(m3) == "– (5 of 19)"
    assert any("real, kaiming: without svhn, sun397, patch_camelyon" in line for line in notes(report))


def test_rendered_and_real_data_are_reported_apart(put, tmp_path):
    put("dsprites_loc", top1=0.8, source="rendered")
    put("dsprites_loc", top1=0.6)
    put("dsprites_ori", top1=0.2, source="rendered")
    report = collect(tmp_path / "runs")
    real, rendered = report.sections
    assert (real.kind.name, rendered.kind.name) == ("real", "rendered")
    assert str(real.averages("kaiming")[2]) == "60.0 (1 of 8)"
    assert [str(a) for a in rendered.averages("kaiming")] == ["50.0 (2 of 8)"]
    markdown = to_markdown(report)
    assert "Rendered surrogates (not VTAB-1K)" in markdown and "compare with no published row" in markdown
    assert "data" in report.differing and set(report.differing["data"]) == {"tfds", "rendered"}


def test_a_subset_of_the_test_images_is_marked(put, tmp_path):
    put("dtd", whole=False)
    report = collect(tmp_path / "runs")
    assert str(report.sections[0].cells["dtd", "kaiming"]) == "50.0†"
    assert str(report.sections[0].averages("kaiming")[0]) == "50.0† (1 of 7)"
    assert any(line.startswith("† fewer images") for line in notes(report))


def test_paired_comparison(whole):
    (paired,) = collect(whole).sections[0].paired()
    gains = np.array([3.0 if k % 2 else -1.0 for k in range(19)])
    assert (paired.method, paired.baseline, paired.tasks) == ("abm", "kaiming", 19)
    assert (paired.better, paired.worse) == (9, 10) and paired.difference == pytest.approx(gains.mean())
    assert paired.loss_ratio == 1


def test_six_tasks_in_one_direction(put, tmp_path):
    """The exact test: both tails of 2 of 2^6 signs."""
    for k, task in enumerate(list(vtab_tasks.TASKS)[:6]):
        put(task, "kaiming", 0, 0.5, losses=[2.0] * 4)
        put(task, "eva", 0, 0.51 + 0.01 * k, losses=[2.0, 1.0] * 2)
    (paired,) = collect(tmp_path / "runs").sections[0].paired()
    assert paired.p == pytest.approx(2 / 2**6) and paired.loss_ratio == pytest.approx(0.75)


def test_runs_of_one_seed_that_differ_are_methods_of_their_own(put, tmp_path):
    put("dtd", lr=1e-3, top1=0.4)
    put("dtd", lr=2e-3, top1=0.5)
    put("pets", lr=2e-3)
    (section,) = collect(tmp_path / "runs").sections
    assert section.methods == ("kaiming, lr 0.001", "kaiming, lr 0.002")
    assert section.cells["dtd", "kaiming, lr 0.001"].mean == 40


def test_selected_settings_may_differ_between_tasks_and_are_shown(put, tmp_path):
    put("dtd", lr=1e-3)
    put("pets", lr=2e-3)
    report = collect(tmp_path / "runs")
    assert report.sections[0].methods == ("kaiming",)
    assert report.differing["lr"] == {"0.001": ["run0/result.json"], "0.002": ["run1/result.json"]}


def test_heads_say_which_settings_others_have_not(put, tmp_path):
    """Each initialisation at the learning rate that was chosen for it."""
    for task in ("dtd", "pets"):
        put(task, "kaiming", lr=2e-3)
        put(task, "abm", lr=1e-3 if task == "dtd" else 4e-3)
    put("dtd", "eva", lr=1e-3)
    put("dtd", "eva", lr=2e-3)
    report = collect(tmp_path / "runs")
    (section,) = report.sections
    heads = ["kaiming, lr 0.002", "abm, lr 0.001 or 0.004", "eva, lr 0.001", "eva, lr 0.002"]
    assert section.methods == ("kaiming", "abm", *heads[2:])  # the last two say it already
    for text in (to_markdown(report), re.sub(r"\\_", "_", to_latex(report))):
        cells = [cell.strip() for cell in re.split("[|&\\\\]", text) if "lr 0.00" in cell]
        assert cells[:4] == heads
    tags, texts = read_page(to_html(report))
    assert [text for text in texts if text in heads][:4] == heads
    assert ["abm, lr 0.001 or 0.004", "kaiming, lr 0.002"] in [row[:2] for row in module.paired_table(section).rows]
    bars = figures.draw_tasks(section)
    assert [text.get_text() for text in bars.legends[0].get_texts()] == heads


def test_equal_settings_are_not_in_the_heads(whole):
    (section,) = collect(whole).sections
    assert list(section.heads.values()) == list(section.methods) == ["kaiming", "abm"]


def test_scores_by_task_hide_none(put, tmp_path):
    """Every method of a task at a height of its own, its mean and standard deviation where a plain count has them."""
    scores = {("dtd", "kaiming"): (0.4, 0.6), ("dtd", "abm"): (0.5, 0.5), ("pets", "abm"): (0.9, 0.8)}
    for (task, init), values in scores.items():
        for seed, top1 in enumerate(values):
            put(task, init, seed, top1)
    (section,) = collect(tmp_path / "runs").sections
    (axes,) = figures.draw_tasks(section).axes
    assert axes.get_xlabel() == "test top-1 (%)" and [t.get_text() for t in axes.get_yticklabels()] == ["dtd", "pets"]
    heights = set()
    for method, drawn in zip(section.methods, axes.containers, strict=True):
        points, _, (lines,) = drawn
        for k, (task, x, y) in enumerate(zip(section.tasks, *points.get_data(), strict=True)):
            values = scores.get((task, method))
            if values is None:
                assert np.isnan(x)
                continue
            (left, _), (right, _) = lines.get_segments()[k]
            mean, std = 100 * np.mean(values), 100 * np.std(values, ddof=1)
            assert (x, left, right) == pytest.approx((mean, mean - std, mean + std)) and round(y) == k
            heights.add(y)
    assert len(heights) == len(scores)


def test_differences_by_task_are_paired_by_seed(put, tmp_path):
    """Against a plain loop; a dot a seed, the mean, and an interval that is the range of so few."""
    scores = {"kaiming": {0: 0.40, 1: 0.50, 2: 0.60}, "abm": {0: 0.43, 1: 0.52}, "eva": {1: 0.45, 3: 0.9}}
    for task, more in (("dtd", 0.0), ("pets", 0.2)):
        for init, values in scores.items():
            for seed, top1 in values.items():
                put(task, init, seed, top1 + (more if init == "abm" else 0))
    put("svhn", "kaiming")
    (section,) = collect(tmp_path / "runs").sections
    figure = figures.draw_differences(section)
    assert [axes.get_title() for axes in figure.axes] == ["abm", "eva"]
    assert "difference to kaiming (points)" in figure.get_supxlabel()
    expected = {"abm": {"dtd": [3, 2], "pets": [23, 22]}, "eva": {"dtd": [-5], "pets": [-5]}}
    for axes in figure.axes:
        names = [text.get_text() for text in axes.get_yticklabels()]
        wanted = expected[axes.get_title()]
        wanted = {**wanted, "mean over tasks": [np.mean(values) for values in wanted.values()]}
        assert names == ["dtd", "pets", "svhn", "mean over tasks"] or axes is not figure.axes[0]
        assert section.differences(axes.get_title()).keys() == {"dtd", "pets"}
        dots, marks = ([line for line in axes.lines if line.get_marker() in of] for of in (".", "o^"))
        spans = [segment for found in axes.collections for segment in found.get_segments()]
        assert len(dots) == len(marks) == len(spans) == 3
        for dot, mark, span, values, place in zip(dots, marks, spans, wanted.values(), (0, 1, 3), strict=True):
            assert list(dot.get_xdata()) == pytest.approx(values) and set(dot.get_ydata()) == {place}
            assert mark.get_xydata()[0] == pytest.approx((np.mean(values), place))
            assert span[:, 0] == pytest.approx((min(values), max(values)))
        assert list(axes.lines[-2].get_xdata()) == [0, 0]  # the baseline


def test_differences_need_a_baseline_and_another(put, tmp_path):
    put("dtd", "kaiming")
    assert figures.draw_differences(collect(tmp_path / "runs").sections[0]) is None
    assert "Differences to" not in to_html(collect(tmp_path / "runs"))
    put("dtd", "abm", lr=7e-3)
    put("dtd", "kaiming", lr=8e-3)
    assert figures.draw_differences(collect(tmp_path / "runs").sections[0]) is None


def test_an_initialisation_looks_the_same_in_every_figure(put, tmp_path):
    """Methods of the same initialisation differ in their lines; those of others in colour or marker."""
    for lr in (1e-3, 2e-3):
        for init in ("kaiming", "abm", "abm_aligned"):
            put("dtd", init, lr=lr)
    report = collect(tmp_path / "runs")
    results = [run.result for run in report.runs if run.result["config"]["lr"] == 1e-3]
    for result in results:
        result["information_loss"] = None
    drawn = [
        *figures.draw_convergence(report.sections[0]).axes[0].lines,
        *figures.draw_comparison(compare(results, VIEW), "dtd").axes[0].lines,
        *(draw_training(result, "").axes[0].lines[1] for result in results),
    ]
    names = [*report.sections[0].heads.values(), *(line.get_label() for line in drawn[6:9])]
    names += [result["config"]["init"] for result in results]
    looks = {}
    for line, name in zip(drawn, names, strict=True):
        looks.setdefault(name.split(",")[0], set()).add((line.get_color(), line.get_marker()))
    assert looks == {"kaiming": {(GREY, "X")}, "abm": {(BLUE, "o")}, "abm_aligned": {(ORANGE, "^")}}
    assert len({(n.split(",")[0], line.get_linestyle()) for n, line in zip(names[:6], drawn[:6], strict=True)}) == 6
    assert len({tuple(style_of(init).values()) for init in INITIALIZERS}) == len(INITIALIZERS)


def test_a_wide_spread_stays_on_a_logarithmic_axis(put, tmp_path):
    """One standard deviation below 0.01 and 1 is negative."""
    for seed, loss in enumerate((0.01, 1.0)):
        put("dtd", seed=seed, losses=[loss] * 4)
    axes = figures.draw_convergence(collect(tmp_path / "runs").sections[0]).axes[0]
    (band,) = axes.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == pytest.approx((0.01, 1.0)) and axes.get_ylim()[0] > 0.001


def test_seeds_of_other_settings_are_no_seeds(put, tmp_path):
    put("dtd", seed=0, epochs=1, top1=0.4)
    put("dtd", seed=1, epochs=2, top1=0.6, losses=[1.0] * 8)
    (section,) = collect(tmp_path / "runs").sections
    assert section.methods == ("kaiming, epochs 1", "kaiming, epochs 2")
    assert to_markdown(collect(tmp_path / "runs")).count("± ") == 1  # in the note alone


def test_other_weights_or_precision_or_data_are_other_methods(put, tmp_path):
    put("dtd", top1=0.2)
    folder = put("dtd", top1=0.8)
    result = json.loads((folder / "result.json").read_text())
    result["weights"]["sha256"] = "f" * 64
    (folder / "result.json").write_text(json.dumps(result))
    put("pets", source="folder", top1=0.5)
    put("pets", source="tfds", seed=1, top1=0.7)
    (section,) = collect(tmp_path / "runs").sections
    assert all(cell.std is None for cell in section.cells.values()) and len(section.methods) == 3


def test_the_same_run_twice_counts_once(put, tmp_path):
    put("dtd", workers=0, top1=0.4)
    put("dtd", workers=1, top1=0.4)
    report = collect(tmp_path / "runs")
    assert str(report.sections[0].cells["dtd", "kaiming"]) == "40.0"
    assert report.unfinished == (("run1/result.json", "left out, it is run0/result.json again"),)


def test_the_same_settings_with_another_result_are_told(put, tmp_path):
    """Two folders of images, say: the record knows that they are folders."""
    put("dtd", top1=0.4, data_dir="one")
    put("dtd", top1=0.6, data_dir="two")
    ((file, why),) = collect(tmp_path / "runs").unfinished
    assert file == "run1/result.json"
    assert why.startswith("left out, it has the settings of run0/result.json and another result")


def test_settings_without_use_are_none(put, tmp_path):
    """kaiming takes no steps of a matching, so that two runs of it are the same whatever they say of these."""
    put("dtd", "kaiming", seed=0, abm_steps=50)
    put("dtd", "kaiming", seed=1, abm_steps=20)
    put("dtd", "abm", seed=0, abm_steps=20)
    report = collect(tmp_path / "runs")
    assert report.sections[0].methods == ("kaiming", "abm") and report.settings["abm_steps"] == 20


def test_each_method_is_compared_with_the_baseline_of_its_settings(put, tmp_path):
    for lr, kaiming, abm in ((1e-3, 0.40, 0.45), (2e-3, 0.60, 0.55)):
        put("dtd", "kaiming", lr=lr, top1=kaiming)
        put("dtd", "abm", lr=lr, top1=abm)
    put("dtd", "eva", lr=5e-3)
    report = collect(tmp_path / "runs")
    pairs = {p.method: (p.baseline, round(p.difference)) for p in report.sections[0].paired()}
    assert pairs == {"abm, lr 0.001": ("kaiming, lr 0.001", 5), "abm, lr 0.002": ("kaiming, lr 0.002", -5)}
    assert any("not compared, as there is no kaiming with equal settings: eva" in line for line in notes(report))


def test_a_reference_tuned_for_another_run_is_no_result(put, tmp_path):
    put("dtd")
    folder = put("dtd", lr=5e-3)
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, "reference_only": True}))
    report = collect(tmp_path / "runs")
    assert report.sections[0].methods == ("kaiming",) and len(report.runs) == 1 and report.unfinished == ()


def test_maps_of_other_layers_have_labels_of_their_own(put, tmp_path):
    put("dtd", "kaiming")
    folder = put("dtd", "gaussian", targets="attn.qkv")
    result = json.loads((folder / "result.json").read_text())
    for lost in result["information_loss"].values():
        lost["kinds"] = [kind for kind in lost["kinds"] if kind["name"] == "attn.qkv"]
        lost["layers"] = [layer for layer in lost["layers"] if layer["name"].endswith("attn.qkv")]
    (folder / "result.json").write_text(json.dumps(result))
    figure = figures.draw_lost(collect(tmp_path / "runs").sections[0])
    labels = [[t.get_text() for t in axes.get_xticklabels()] for axes in figure.axes[:2]]
    assert len(labels[0]) == 4 and labels[1] == ["attn.qkv"]


def test_files_that_are_damaged_are_named(put, tmp_path, capsys):
    """And do not block the report of the others."""
    put("dtd", top1=0.43)
    for name, content, message in (
        ("result.json", '{"schema": 6}', "result.json: it lacks config"),
        ("result.json", '{"schema": 1}', "has schema 1, this version reads 6"),
        ("result.json", "[]", "result.json holds no JSON object"),
        ("result.json", '{"schema": "glue-2"}', "(a result of abm-glue: use abm-glue report)"),
        ("failure.json", "", "failure.json is not JSON"),
        ("failure.json", '{"schema": 6, "reason": 3, "time": ""}', "failure.json: reason is 3"),
    ):
        other = put("pets")
        (other / "result.json").unlink()
        (other / name).write_text(content)
        assert main(["report", str(tmp_path / "runs")]) == 0
        shown = capsys.readouterr().out
        assert f"No result: {other.name} (" in shown and message in shown and re.search(r"\| dtd +\| +43\.0 \|", shown)
        shutil.rmtree(other)


def test_a_reason_of_many_lines_is_one_line(put, tmp_path):
    put("dtd")
    failed = put("pets")
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"schema": 6, "reason": "RuntimeError: one\n  two\n", "time": ""}))
    assert all(line.startswith("%") or "two" not in line for line in to_latex(collect(tmp_path / "runs")).splitlines())


def test_selection_is_left_out_and_what_is_not_finished_is_named(put, tmp_path):
    put("dtd")
    put("dtd", evaluate="val", top1=0.9)
    failed, begun = put("pets"), put("svhn")
    for folder in (failed, begun):
        (folder / "result.json").unlink()
    (failed / "failure.json").write_text('{"schema": 6, "reason": "Diverged: not finite", "time": ""}')
    report = collect(tmp_path / "runs")
    assert len(report.runs) == 1
    assert report.unfinished == ((failed.name, "Diverged: not finite"), (begun.name, "not begun"))
    assert f"No result: {failed.name} (Diverged: not finite)." in notes(report)


def test_csv_has_a_line_a_run(whole):
    rows = list(csv.DictReader(io.StringIO(to_csv(collect(whole)))))
    assert len(rows) == 19 * 4 and {row["file"] for row in rows} == {f"run{k}/result.json" for k in range(76)}
    row = next(r for r in rows if (r["task"], r["init"], r["seed"]) == ("dtd", "abm", "1"))
    assert float(row["top1"]) == pytest.approx(0.40 + 0.02 + 0.02 - 0.01) and row["group"] == "natural"
    recorded = json.loads((whole / row["file"]).read_text())
    assert recorded["test"]["top1"] == float(row["top1"])


def test_latex(whole):
    table = re.sub(" +", " ", to_latex(collect(whole)))
    assert r"patch\_camelyon & 48.0 $\pm$ 1.4 & 51.0 $\pm$ 1.4 \\" in table
    typeset = "\n".join(line for line in table.splitlines() if not line.startswith("%"))
    assert table.count(r"\begin{tabular}{lrr}") == 1 and "_" not in typeset.replace(r"\_", "")
    assert re.search(r"LoRA r8 \(published\) & 79\.5 & 84\.[56] & 59\.8 & 72\.3 & 74\.6 ", table)  # beside ours
    assert "% dtd abm 1 43.00 run7/result.json" not in table and table.count("/result.json") == 76
    assert "m19, mean of the 19 tasks" in table


@pytest.mark.parametrize(
    ("method", "means"),
    [
        ("LoRA r8", [79.5, 84.5, 59.8, 72.3, 74.6]),
        ("Full fine-tuning", [75.9, 83.4, 47.6, 65.6, 69.0]),
        ("Convpass", [81.7, 85.3, 62.7, 74.4, 76.6]),
        ("FacT-TK", [80.6, 85.3, 60.7, 73.2, 75.6]),
        ("BitFit", [73.3, 78.2, 44.1, 62.1, 65.2]),
        ("VPT-Shallow", [76.8, 79.7, 47.0, 64.9, 67.8]),
        ("AdaptFormer", [80.6, 84.9, 58.8, 72.3, 74.8]),
        ("Hydra", [81.8, 86.0, 61.7, 74.2, 76.5]),
        ("GPS", [83.7, 86.8, 61.9, 75.2, 77.5]),
    ],
)
def test_published_means(method, means):
    """Recomputed for the fact sheet from the same rows."""
    row = next(row for row in PUBLISHED if row.method == method)
    assert [float(mean) for mean in published_means(row, VIEW.data.kinds[0].means)] == pytest.approx(means, abs=0.101)
    assert set(row.scores) == set(vtab_tasks.TASKS)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no finished run below"),
        (
            lambda folder: (folder / "a").mkdir(parents=True) or (folder / "a/config.json").write_text("{}"),
            "no finished run",
        ),
    ],
)
def test_nothing_to_report(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "runs")
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert message in capsys.readouterr().err


def test_a_result_of_another_schema(put, tmp_path, capsys):
    folder = put("dtd")
    (folder / "result.json").write_text('{"schema": 1}')
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert "has schema 1, this version reads 6" in capsys.readouterr().err


def test_a_folder_of_another_harness(put, tmp_path, capsys):
    names = [put("dtd").name, put("pets").name]
    for name in names:
        (tmp_path / "runs" / name / "result.json").write_text('{"schema": "instruct-2"}')
    assert main(["report", str(tmp_path / "runs")]) == 2
    assert f"; {', '.join(names)} is a result of abm-instruct: use abm-instruct report\n" in capsys.readouterr().err


def test_the_command(whole, tmp_path, capsys):
    assert main(["report", str(whole), "--out", str(tmp_path / "report")]) == 0
    assert "m19, mean of the 19 tasks" in capsys.readouterr().out
    links = re.findall('href="([^"]+)"', (tmp_path / "report" / "report.html").read_text())
    inside = [link for link in links if link.startswith("#")]
    assert len(inside) == 19 * 2 and len(links) == 19 * 2 + 76
    page = (tmp_path / "report" / "report.html").read_text()
    assert all(f'id="{link[1:]}"' in page for link in inside)
    assert all((tmp_path / "report" / link).is_file() for link in links if link not in inside)
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == [
        "report.csv", "report.html", "report.md", "report.tex"
    ]  # fmt: skip


# ---- names with any characters -------------------------------------------------------------------

ODD = "a|b <script>alert(1)</script> `c` _d_ 50% & # $x_{$ {g} \\h ~ ^ [i](j) *k*\nl"
SHOWN = " ".join(ODD.split())


@pytest.fixture
def odd(put, tmp_path):
    """Two starts whose settings, folders and reasons to fail have such names."""
    for init in ("kaiming", "abm"):
        for targets in (ODD, "all"):
            folder = put("dtd", init, targets=targets, data_dir=f"/data/{ODD}")
            folder.rename(folder.with_name(f"{folder.name} <b>#1? %20|_x_"))
    failed = put("pets")
    (failed / "result.json").unlink()
    (failed / "failure.json").write_text(json.dumps({"schema": 4, "reason": f"ValueError: {ODD}", "time": ""}))
    return tmp_path / "runs"


def read_page(page):
    """Opening tags, and all text outside styles and scripts."""
    found = html.parser.HTMLParser()
    tags, texts = [], []
    found.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    found.handle_data = lambda text: tags and tags[-1][0] in ("style", "script") or texts.append(text)
    found.feed(page)
    return tags, texts


def test_names_in_markdown_come_back(odd):
    markdown = pytest.importorskip("markdown")
    report = collect(odd)
    (section,) = report.sections
    tags, texts = read_page(markdown.markdown(to_markdown(report), extensions=["tables"]))
    assert len(section.methods) == 4 and sum(SHOWN in method for method in map(one_line, section.methods)) == 2
    assert {tag for tag, _ in tags} == {
        "h1",
        "h2",
        "p",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "strong",
        "ul",
        "li",
    }
    for name in (*section.methods, *(one.file for one in report.runs)):
        assert one_line(name) in texts
    assert any(f"(ValueError: {SHOWN})" in text for text in texts)


def test_names_in_html_come_back(odd):
    report = collect(odd)
    (section,) = report.sections
    tags, texts = read_page(to_html(report, "../runs #1"))
    assert [tag for tag, _ in tags].count("script") == 1 and not {"b", "em", "code"} & {tag for tag, _ in tags}
    for name in (*section.methods, *(one.file for one in report.runs)):
        assert name in texts
    links = [urllib.parse.unquote(a["href"]) for tag, a in tags if tag == "a" and not a["href"].startswith("#")]
    assert sorted(links) == sorted(f"../runs #1/{one.file}" for one in report.runs)
    assert not any("#" in a["href"][1:] or "?" in a["href"] for tag, a in tags if tag == "a" and a["href"][0] != "#")


def test_names_in_latex_are_escaped(odd):
    report = collect(odd)
    text = to_latex(report)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert latex(SHOWN) in body and SHOWN not in body
    assert body.count(r"\begin{tabular}") == body.count(r"\end{tabular}") == 2
    # Every row has the columns of its table: no & but those between.
    for table in body.split(r"\begin{tabular}")[1:]:
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    assert all(line.startswith("%") for line in text.splitlines() if "alert(1)</script>" in line)


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture
def pages(whole, browser):
    """Opens the report in a window of some width."""
    write_files(collect(whole), whole)
    opened = []

    def open_page(width):
        opened.append(browser.new_page(viewport={"width": width, "height": 800}))
        opened[-1].goto(f"file://{whole}/report.html")
        return opened[-1]

    yield open_page
    for page in opened:
        page.close()


@pytest.mark.slow
def test_print_shows_what_is_folded(pages):
    page = pages(1200)
    inside = "[...document.querySelectorAll('details td')].map((cell) => cell.checkVisibility())"
    assert not any(page.evaluate(inside))
    page.emulate_media(media="print")
    found = page.evaluate(inside)
    assert len(found) > 19 * 4 and all(found)


@pytest.mark.slow
def test_a_table_that_goes_on_says_so(pages, tmp_path):
    """Its edge is in shadow until it is scrolled to its end."""
    page = pages(390)
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    wide = page.locator(".wide").last
    assert wide.evaluate("(e) => e.scrollWidth > e.clientWidth + 50")

    def edge():
        wide.screenshot(path=tmp_path / "edge.png")
        return matplotlib.image.imread(tmp_path / "edge.png")[:, -4:, :3].mean((0, 2)).min()

    before = edge()
    wide.evaluate("(e) => (e.scrollLeft = e.scrollWidth)")
    assert before < 0.85 < 0.93 < edge()


@pytest.mark.slow
@pytest.mark.figures
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page(whole, put, browser, width):
    put("dsprites_loc", source="rendered", top1=0.9)
    write_files(collect(whole), whole)
    page = browser.new_page(viewport={"width": width, "height": 800})
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{whole}/report.html")
    own = [url for url in requests if not url.startswith("data:")]
    assert errors == [] and own == [f"file://{whole}/report.html"]
    assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 100)")
    assert page.locator("img").count() == 4 + 3  # of real data with differences
    # Nothing but tables is wider than the window, and those scroll by themselves.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    table = page.locator("table.results").first
    names = "[...document.querySelector('table.results').tBodies[0].rows].map((r) => r.cells[0].firstChild.data.trim())"
    order = page.evaluate(names)
    assert order[:19] == list(vtab_tasks.TASKS) and order[19].startswith("Natural")
    table.locator("thead button").nth(2).click()
    ascending = page.evaluate(names)
    values = {task: 0.40 + 0.01 * k + (0.03 if k % 2 else -0.01) for k, task in enumerate(vtab_tasks.TASKS)}
    assert [values[t] for t in ascending[:19]] == sorted(values.values()) and ascending[19:] == order[19:]
    table.locator("thead button").nth(2).click()
    assert page.evaluate(names)[:19] == ascending[18::-1]
    page.locator("table.results a").first.click()  # to the runs, which are folded away
    assert page.evaluate("decodeURI(location.hash)").endswith("/kaiming")
    assert page.locator("details[open] a").first.is_visible()
    page.close()
