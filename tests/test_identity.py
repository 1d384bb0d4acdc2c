"""What a run was made of - data, weights, code - is checked when it is resumed, read again, compared and reported."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import official
import pytest
import torch
from conftest import TINY, build_vit
from helpers import break_off
from PIL import Image

import vtab_tasks
from abm_vision import INITIALIZERS
from abm_vision.initializers import ours, peft_own
from abm_vision.runs import content
from abm_vision.vtab import make_config, run
from abm_vision.vtab.__main__ import main
from vtab_tasks.content import content as task_content

TASK = "kitti_dist"  # the smallest test split: 711 images
PLAIN = {**{k: v for k, v in TINY.items() if not k.startswith("abm_")}, "init": "kaiming", "task": TASK}


def write_folder(folder, seed=0):
    """A community folder of small pictures, every one another."""
    random = np.random.default_rng(seed)
    for split, count in (("train800val200", 1000), ("test", 711)):
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for k in range(count):
            Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8)).save(folder / f"images/{split}/{k:06}.png")
            lines.append(f"images/{split}/{k:06}.png {random.integers(4)}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / TASK)


@pytest.fixture
def data(original, tmp_path):
    """A copy of the data that a test may change."""
    return shutil.copytree(original, tmp_path / "data" / TASK)


def on(data, **changes):
    return make_config(**{**PLAIN, "data_dir": str(data.parent), **changes})


def change_labels(data):
    """Every label of the training list."""
    path = data / "train800val200.txt"
    lines = [line.split() for line in path.read_text().splitlines()]
    path.write_text("".join(f"{name} {(int(label) + 1) % 4}\n" for name, label in lines))


def change_image(data, split="train800val200"):
    """One picture, with its size in bytes and its time of modification as before."""
    path = data / f"images/{split}/000003.png"
    before, picture = path.stat(), np.array(Image.open(path))
    size = before.st_size
    for shift in range(1, 100):
        Image.fromarray(picture + np.uint8(shift)).save(path)
        if path.stat().st_size == size:
            break
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change_tested_image(data):
    for k in range(711):  # whichever of them are drawn for the test
        shutil.copy(data / f"images/test/{k:06}.png", data / "spare.png")
        shutil.copy(data / "images/train800val200/000000.png", data / f"images/test/{k:06}.png")


CHANGES = [
    (change_labels, "training labels"),
    (change_image, "training images"),
    (change_tested_image, "test images"),
]


@pytest.mark.slow
def test_changed_data_are_an_error_of_a_resumed_and_of_a_finished_run(original, data, tmp_path, monkeypatch):
    finished, broken = on(data, epochs=1), on(data)
    run(finished, tmp_path / "out")
    break_off(broken, tmp_path / "out", monkeypatch)
    for change, named in CHANGES:
        shutil.rmtree(data)
        change(shutil.copytree(original, data))
        for config in (finished, broken):
            with pytest.raises(ValueError, match=rf"{named} \(folder, sha256 \w+ then, .* now\).*--rerun") as raised:
                run(config, tmp_path / "out")
            assert len(str(raised.value)) < 500 and str(tmp_path / "out" / config.run_name()) in str(raised.value)
    assert run(broken, tmp_path / "out", rerun=True)["test"]["count"] == 60


def test_the_same_data_in_another_place_are_the_same(data, tmp_path, monkeypatch):
    monkeypatch.chdir(data.parent.parent)
    config = make_config(**{**PLAIN, "data_dir": "data"})
    break_off(config, tmp_path / "out", monkeypatch)
    data.parent.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tmp_path / "moved")
    resumed = run(config, tmp_path / "out")
    assert run(config, tmp_path / "out") == resumed


def test_a_finished_run_whose_data_are_gone_is_handed_back_and_says_so(data, tmp_path):
    config = on(data, epochs=1)
    result = run(config, tmp_path / "out")
    lists = {name: (data / name).read_text() for name in ("train800val200.txt", "test.txt")}
    (data / lists["test.txt"].split()[0]).rename(tmp_path / "first.jpg")
    with pytest.warns(UserWarning, match="could not be checked whole: .*there is no .*fetch the missing image"):
        assert run(config, tmp_path / "out") == result
    # What is there is checked all the same.
    lines = lists["train800val200.txt"].splitlines()
    (data / "train800val200.txt").write_text("".join(f"{line[:-1]}{(int(line[-1]) + 1) % 3}\n" for line in lines))
    with pytest.raises(ValueError, match="training labels"):
        run(config, tmp_path / "out")
    shutil.rmtree(data)
    with pytest.warns(UserWarning, match=f"could not be checked whole: no data for .*{data.parent}"):
        assert run(config, tmp_path / "out") == result


def test_a_result_of_another_run_in_the_folder(data, tmp_path):
    config = on(data, epochs=1)
    folder = Path(run(config, tmp_path / "out")["folder"])
    content = json.loads((folder / "result.json").read_text())
    for name, value in (("seed", 1), ("lr", 5.0)):
        changed = {**content, "config": {**content["config"], name: value}}
        (folder / "result.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"is of another run, it has {name} {value}"):
            run(config, tmp_path / "out")


def weights_file(path, shift=0.0):
    model = build_vit(num_classes=3, img_size=160).requires_grad_(False)
    model.norm.bias += shift
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.mark.slow
def test_a_changed_weights_file(tmp_path, monkeypatch):
    path = tmp_path / "test_vit.pth"
    finished, broken = (make_config(**{**PLAIN, "epochs": n, "weights": weights_file(path)}) for n in (1, 2))
    result = run(finished, tmp_path / "out")
    break_off(broken, tmp_path / "out", monkeypatch)
    weights_file(path, 1.0)
    for config in (finished, broken):
        with pytest.raises(ValueError, match=r"weights \(sha256 \w{12} then, sha256 \w{12} now\)"):
            run(config, tmp_path / "out")
    path.unlink()
    with pytest.warns(UserWarning, match="could not be checked whole"):
        assert run(finished, tmp_path / "out") == result


@pytest.mark.slow
def test_a_changed_drawing_is_other_data(tmp_path, monkeypatch):
    config = make_config(**{**PLAIN, "epochs": 1})
    run(config, tmp_path)
    monkeypatch.setattr("vtab_tasks.content.drawing", lambda task: "of another version")
    with pytest.raises(ValueError, match=r"training images \(rendered, code \w+ then, .*code of another version now\)"):
        run(config, tmp_path)


def test_a_changed_initialisation_is_not_answered_from_an_old_run(tmp_path, monkeypatch):
    config = make_config(**{**PLAIN, "epochs": 1, "init": "random_b"})
    run(config, tmp_path)
    other = dataclasses.replace(INITIALIZERS["random_b"], apply=peft_own.keep)
    monkeypatch.setitem(INITIALIZERS, "random_b", other)
    with pytest.raises(ValueError, match=r"initialisation \(code \w+ then, code \w+ now\)"):
        run(config, tmp_path)


@pytest.mark.slow
def test_a_reference_that_was_tuned_again(tmp_path):
    tuned = run(make_config(**{**PLAIN, "epochs": 1}), tmp_path)["folder"]
    config = make_config(**{**TINY, "task": TASK, "epochs": 1, "init": "abm_tuned", "abm_reference": tuned})
    run(config, tmp_path)
    other = run(make_config(**{**PLAIN, "epochs": 1, "seed": 1}), tmp_path)["folder"]
    shutil.copy(f"{other}/adapter/adapter_model.safetensors", f"{tuned}/adapter/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"reference \(sha256 \w+ then, sha256 \w+ now\)"):
        run(config, tmp_path)


def test_compare_refuses_runs_on_other_data(data, tmp_path, capsys):
    first = run(on(data, epochs=1), tmp_path / "a")["folder"]
    change_labels(data)
    second = run(on(data, epochs=1, init="gaussian"), tmp_path / "a")["folder"]
    assert main(["compare", first, second, "--report", str(tmp_path / "report")]) == 2
    assert "the runs differ in more than task" in (err := capsys.readouterr().err) and "training labels" in err


@pytest.mark.slow
def test_report_keeps_runs_on_other_data_apart(data, tmp_path, capsys):
    out = tmp_path / "a"
    for config in (on(data, epochs=1), on(data, epochs=1, seed=1), on(data, epochs=1, init="gaussian")):
        run(config, out)
    change_labels(data)
    run(on(data, epochs=1, seed=2), out)
    run(on(data, epochs=1, init="gaussian", seed=2), out)
    run(on(data, epochs=1, init="random_b"), out)
    assert main(["report", str(out)]) == 0
    shown = capsys.readouterr().out
    top1 = {(r["config"]["init"], r["config"]["seed"]): 100 * r["test"]["top1"] for r in map(read, out.glob("*/"))}
    row = next(line for line in shown.splitlines() if line.startswith(f"| {TASK} "))
    values = [cell.strip() for cell in row.split("|")[2:-1]]
    of_two = [top1["kaiming", 0], top1["kaiming", 1]]
    assert f"{np.mean(of_two):.1f} ± {np.std(of_two, ddof=1):.1f}†" in values
    assert f"{top1['kaiming', 2]:.1f}†" in values and f"{top1['gaussian', 0]:.1f}†" in values
    assert "are on other data than the rest" in shown
    paired = [
        [cell.strip() for cell in line.split("|")] for line in shown.splitlines() if line.startswith("| gaussian")
    ]
    assert len(paired) >= 2  # each with the baseline on its own data
    difference = top1["gaussian", 2] - top1["kaiming", 2]
    assert any(f"{difference:+.2f}" in cells for cells in paired)


def read(folder):
    return json.loads((folder / "result.json").read_text())


# The parts


def test_hashes_are_kept_while_files_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(content, "SETTLED", -1.0)
    path, calls = tmp_path / "file", []
    path.write_bytes(b"abc")

    def count():
        calls.append(1)
        return path.read_text()

    assert [content.remembered([path], "text", count) for _ in range(3)] == ["abc"] * 3 and len(calls) == 1
    before = path.stat()
    path.write_bytes(b"abd")  # as long, and with the same time of modification
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content.remembered([path], "text", count) == "abd" and len(calls) == 2
    (kept,) = (tmp_path / "cache").rglob("*.json")
    kept.write_text("{")
    assert content.remembered([path], "text", count) == "abd" and len(calls) == 3


def test_a_hash_of_files_just_written_is_not_kept(tmp_path, monkeypatch):
    """Within a clock tick a file may change twice under one time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("a")
    content.sha256_of([tmp_path / "file"])
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_without_a_cache_the_hash_is_the_same(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("a")
    assert content.sha256_of([tmp_path / "file"]).startswith("ca978112ca1bbdca")


def test_versions_of_initialisations(monkeypatch):
    """Comments and words are no part of it; what is called, and constants, are."""
    found = {name: content.version(init.apply) for name, init in INITIALIZERS.items()}
    assert found["pissa"] != found["olora"] and found["abm"] == found["abm_tuned"] and "peft" in found["pissa"]
    assert len(set(found.values())) == len(found) - 1
    before = content.version(ours.random_b)
    monkeypatch.setattr(ours, "RANDOM_B_STD", 0.02)
    assert content.version(ours.random_b) != before


def test_content_of_every_source(original, tmp_path):
    folder = vtab_tasks.load(TASK, "train800val200", source="folder", data_dir=original.parent)
    drawn = vtab_tasks.load(TASK, "train800val200", source="rendered")
    found = [task_content(data, content.remembered) for data in (folder, drawn, folder[:5], drawn[:5])]
    assert len({c["images"] for c in found}) == 3  # what is drawn is named by its code
    assert all(set(c) == {"images", "labels"} for c in found)


def test_content_of_data_prepared_by_tfds(tmp_path, monkeypatch):
    """The same examples prepared twice are the same, others are not; and it needs no TensorFlow."""
    monkeypatch.setitem(vtab_tasks.TASKS, "svhn", official.small_edition(vtab_tasks.get_task("svhn")))
    make, found = official.make_examples, []
    for place, shift in (("one", 0), ("two", 0), ("three", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(
                official, "make_examples", lambda features, size, seed, k=shift: make(features, size, seed + k)
            )
            official.write_official("svhn_cropped", tmp_path / place)
        data = vtab_tasks.load("svhn", "test", source="tfds", data_dir=tmp_path / place)
        found.append(task_content(data, content.remembered))
    assert found[0] == found[1]
    assert found[0]["images"] != found[2]["images"] and found[0]["labels"] != found[2]["labels"]
    part = task_content(data[:4], content.remembered)
    assert part["images"] != found[2]["images"] and part["images"].startswith("tfds, sha256 ")
