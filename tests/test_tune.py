"""Runs on one's own images: the best epoch kept, resumed runs, their files and commands; predict and evaluate."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import answer
from PIL import Image
from safetensors.torch import load_file

from abm_vision import create_backbone, load_adapter
from abm_vision.images.answers import Answers
from abm_vision.images.classifier import load_classifier
from abm_vision.images.data import Preprocessing
from abm_vision.images.evaluate import Evaluation, evaluate
from abm_vision.images.photos import read_photo
from abm_vision.images.predict import predict
from abm_vision.runs import checkpoint
from abm_vision.runs.commands import compare
from abm_vision.runs.folder import Diverged
from abm_vision.tune import make_config, run
from abm_vision.tune.__main__ import main
from abm_vision.tune.rate import choose_rate
from abm_vision.tune.view import VIEW

ROOT = Path(__file__).parent.parent
COLOURS = {"grün": (60, 160, 60), "red cat": (200, 40, 40), "синий": (40, 40, 200)}
TINY = {
    "model": "test_vit",
    "weights": "none",
    "image_size": 32,
    "rank": 2,
    "epochs": 3,
    "batch_size": 8,
    "lr": 1e-2,
    "precision": "fp32",
    "device": "cpu",
    "init": "kaiming",
}


def photos(root, count, spread=60, seed=0):
    """Noisy pictures of a colour for every class, of several sizes."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-spread, spread, (20 + i % 3, 24, 3))
            Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Parts for training and test; validation is split off."""
    root = tmp_path_factory.mktemp("my photos")
    photos(root / "train", 10)
    photos(root / "test", 4, seed=1)
    return root


def tiny(folder, **changes):
    return make_config(data=str(folder), **{**TINY, **changes})


def words(folder, *more, **changes):
    settings = {**TINY, **changes}
    flags = [word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    return [str(folder), *flags, *map(str, more)]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    lines = []
    return run(tiny(folder), tmp_path_factory.mktemp("finished"), say=lines.append), lines


def tensors(result):
    return load_file(Path(result["folder"]) / "adapter" / "adapter_model.safetensors")


def same(a, b):
    found = tensors(a), tensors(b)
    return found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


# --------------------------------------------------------------------------------------------------------- the run


@pytest.mark.checkout
def test_result_and_lines(finished, folder):
    result, lines = finished
    assert result["classes"] == sorted(COLOURS) and result["num_classes"] == 3
    assert [result["data"][p]["images"] for p in ("train", "validation", "test")] == [24, 6, 12]
    assert result["test"]["split"] == "test" and result["test"]["count"] == 12 and result["test"]["top1"] > 0.8
    assert len(result["loss_per_step"]) == 9 and list(result["top1_per_epoch"]) == ["1", "2", "3"]
    assert [line.split()[0] for line in lines] == ["device", "data", "weights", *["epoch"] * 3]
    assert "3 classes; 24 training, 6 validation, 12 test images" in lines[1]
    files = {path.name for path in Path(result["folder"]).iterdir()}
    assert files == {".lock", "adapter", "answers.png", "config.json", "curves.png", "result.json"}
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "results.md").read_text()))
    assert (set(result) | set(result["data"]) | set(result["test"])) - {"folder"} <= explained
    card = (Path(result["folder"]) / "adapter" / "README.md").read_text()
    assert "`grün`, `red cat`, `синий`" in card and "of 12 test images" in card


def test_a_finished_run_is_read_and_other_pictures_are_an_error(folder, finished, tmp_path):
    out = Path(finished[0]["folder"]).parent
    assert run(tiny(folder), out) == finished[0]
    mine = shutil.copytree(folder, tmp_path / "mine")
    first = run(tiny(mine, epochs=1), tmp_path)
    shutil.copy(mine / "test" / "grün" / "0.png", mine / "test" / "grün" / "9.png")
    with pytest.raises(ValueError, match=r"made with other content: test images \(folder, sha256 \w{12} then"):
        run(tiny(mine, epochs=1), tmp_path)
    assert run(tiny(mine, epochs=1), tmp_path, rerun=True)["test"]["count"] == first["test"]["count"] + 1


def of_twelve(correct):
    """Answers to twelve images of which so many are correct, one of them in the picture."""
    labels = torch.zeros(12, dtype=torch.int64)
    pixels = torch.zeros((1, 3, 2, 2), dtype=torch.uint8)
    return Answers((torch.arange(12) >= correct).long(), labels, torch.tensor([0]), pixels)


def test_the_best_epoch_on_validation_is_kept(folder, tmp_path, monkeypatch):
    """Epoch 2 is given the highest top-1; the adapter is that of a run that has only two epochs of the three."""
    scores, kept = iter([1, 5, 3]), []
    save = checkpoint.save

    def keep(run, *rest):
        save(run, *rest)
        kept.append({name: tensor.clone() for name, tensor in checkpoint.trained(run.model).items()})

    monkeypatch.setattr(checkpoint, "save", keep)
    monkeypatch.setattr("abm_vision.tune.harness._answer", lambda *_: of_twelve(next(scores, 7)))
    result = run(tiny(folder), tmp_path)
    assert result["best_epoch"] == 2 and result["top1_per_epoch"] == {"1": 1 / 12, "2": 5 / 12, "3": 3 / 12}
    saved = tensors(result)
    (head,) = [name for name in kept[0] if name.endswith("head.modules_to_save.default.weight")]
    (own,) = [tensor for name, tensor in saved.items() if name.endswith("head.weight")]
    assert torch.equal(own, kept[1][head]) and not torch.equal(own, kept[2][head])


@pytest.mark.parametrize("augment", ["timm", pytest.param("none", marks=pytest.mark.slow)])
def test_an_interrupted_run_is_resumed_with_the_same_result(folder, tmp_path, augment):
    def say(line):
        if line.startswith("epoch   2"):
            raise KeyboardInterrupt

    config = tiny(folder, augment=augment, init="abm", abm_steps=2, abm_samples=8, dropout=0.1)
    whole = run(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken", say=say)
    resumed = run(config, tmp_path / "broken")
    for name in ("loss_per_step", "top1_per_epoch", "best_epoch", "test"):
        assert resumed[name] == whole[name]
    assert same(resumed, whole)


def test_a_run_that_is_resumed_after_its_last_epoch_has_the_best_one(folder, tmp_path, monkeypatch):
    """Killed between the last epoch and the score: the best weights are in the checkpoint."""
    scores = {1: 5, 2: 6, 3: 4}
    epochs = iter([1, 2, 3])
    monkeypatch.setattr("abm_vision.tune.harness._answer", lambda *_: of_twelve(scores.get(next(epochs, 0), 7)))

    def say(line):
        if line.startswith("epoch   3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tiny(folder), tmp_path / "broken", say=say)
    resumed = run(tiny(folder), tmp_path / "broken")
    epochs = iter([1, 2, 3])
    assert resumed["best_epoch"] == 2 and same(resumed, run(tiny(folder), tmp_path / "whole"))


def test_diagnosis_takes_validation_images_and_needs_few(folder, tmp_path):
    result = run(tiny(folder, init="abm", abm_steps=1, abm_samples=8, epochs=1), tmp_path, diagnose=True)
    loss = result["information_loss"]
    assert loss["before"]["samples"] == loss["after"]["samples"] == 6 and loss["after_on_seen"]["samples"] == 8


def test_broken_files_are_listed_in_the_result(tmp_path):
    root = photos(tmp_path / "photos", 4)
    (root / "grün" / "x.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"1 of 13 files cannot be read.*\n.*x\.jpg"):
        run(tiny(root), tmp_path)
    result = run(tiny(root, skip_broken=True, epochs=1), tmp_path)
    assert result["data"]["skipped"] == [str(root / "grün" / "x.jpg")] and result["test"] is None
    assert result["validation"]["count"] == 3 and result["data"]["test"] is None


# -------------------------------------------------------------------------------------------------------- commands


def test_the_command_prints_the_score_and_what_to_do_next(folder, capsys, tmp_path):
    code, out, err = answer(words(folder, "--out", tmp_path, epochs=1), capsys, main)
    assert code == 0 and not err
    lines = out.splitlines()
    (name,) = [path.name for path in tmp_path.iterdir()]
    assert any(re.search(r"\[3 classes\]  top-1 \d+\.\d\d % of 12 test images, epoch 1 of 1", line) for line in lines)
    shown = lines[lines.index("next:") + 1 :]
    assert shown[0].split()[:3] == ["abm-tune", "predict", f"{tmp_path}/{name}"]
    assert f"abm-tune compare '{folder}' --init kaiming,abm --lr 0.01 --seeds 3" in shown[4]
    suggested = vars(compare.parser(VIEW).parse_args(shlex.split(shown[4])[2:]))
    made, own = tiny(folder, epochs=1).to_dict(), {"runs", "init", "lr", "seeds"}
    same = {name: value for name, value in suggested.items() if name in made and name not in own}
    assert same == {name: made[name] for name in same} and {"epochs", "image_size", "model"} <= set(same)
    assert "export" in shown[2] and "demo" in shown[3]
    code, out, _ = answer(words(folder, "--out", tmp_path, "--json", epochs=1), capsys, main)
    assert json.loads(out)["best_epoch"] == 1


def test_printed_settings_are_read_again(folder, capsys, tmp_path):
    code, out, _ = answer(words(folder, "--print-config"), capsys, main)
    assert code == 0 and json.loads(out)["config"] == tiny(folder).to_dict()
    (tmp_path / "mine.json").write_text(out)
    _, again, _ = answer(["--config", tmp_path / "mine.json", "--seed", 3, "--print-config"], capsys, main)
    assert json.loads(again)["config"] == tiny(folder, seed=3).to_dict()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["absent"], r"there is no absent: give FOLDER/CLASS"),
        ([], "no data are given: name them first, or after --data"),
        (["--validation", "1"], r"validation is 1\.0; it must lie between 0 and 1"),
        (["--augment", "much"], "invalid choice: 'much'"),
        (["--image-size", "33"], r"does not run at 33 px"),
        (["--model", "vit_smal"], "timm has no model 'vit_smal'"),
        (["--out", "a/runs"], r"a/runs holds runs, not pictures of a class: move it, or choose another --out"),
        (["a", "b"], "unrecognized arguments: b"),
        (["predikt"], r"there is no command predikt; did you mean predict\?"),
        (["predict", "absent", "absent.png"], r"1 of 1 file cannot be read.*\n.*no image absent\.png"),
        (["predict", "absent", __file__], r"test_tune\.py cannot be read as an image"),
        (["evaluate", "absent", "absent"], "there is no absent"),
        (["suite", "a", "--init", "kaiming", "--grid", "evaluate=val,test"], "the suite itself sets evaluate"),
    ],
)
def test_refused(more, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "a", 2)
    commands, place = ("predict", "predikt", "evaluate", "suite", "absent", "a"), ["a"] if more else []
    given = [*words("")[1:], *place, *more] if not more or more[0] not in commands else more
    code, _, err = answer(given, capsys, main)
    assert code == 2 and re.search(message, err) and err.startswith("abm-tune") and "Traceback" not in err


def test_compare_takes_the_folder(folder, capsys, tmp_path):
    common = ["--out", tmp_path / "runs", "--quiet", *words(folder, lr="1e-2", epochs=1, init="kaiming,orthogonal")[1:]]
    code, out, err = answer(["compare", folder, "--seeds", 1, *common], capsys, main)
    assert code == 0, err
    assert "kaiming" in out and "orthogonal" in out and (tmp_path / "runs" / "compare.png").is_file()
    code, out, err = answer(["report", tmp_path / "runs"], capsys, main)
    assert code == 0 and "held-out top-1" in out and "scored at its best epoch on validation" in out, err
    runs = [path.parent for path in (tmp_path / "runs").glob("*/result.json")]
    assert answer(["compare", *runs, "--report", tmp_path], capsys, main)[0] == 0


def test_two_seeds_have_splits_of_their_own_and_are_reported_together(tmp_path, capsys):
    root = photos(tmp_path / "photos", 4)
    found = [run(tiny(root, seed=seed, epochs=1), tmp_path / "runs") for seed in (0, 1)]
    assert found[0]["origin"]["validation images"] != found[1]["origin"]["validation images"]
    code, out, err = answer(["report", tmp_path / "runs"], capsys, main)
    assert code == 0 and "other data" not in out, err


def test_the_rate_is_the_best_on_validation_of_short_runs(folder, tmp_path, capsys, monkeypatch):
    """Whole runs are stood in for by a table of scores."""
    scores, made = {5e-4: 0.5, 1e-3: 0.75, 2e-3: 0.5, 4e-3: 0.75}, []

    def stand_in(config, out):
        made.append(config)
        if config.lr not in scores:
            raise Diverged("the training loss is not finite")
        return {"validation": {"top1": scores[config.lr]}}

    monkeypatch.setattr("abm_vision.tune.rate.run", stand_in)
    lines = []
    assert choose_rate(tiny(folder, epochs=9), tmp_path, lines.append) == 1e-3  # 4e-3 is as near: the first of them
    assert [(c.epochs, c.evaluate, c.lr) for c in made] == [(4, "val", r) for r in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)]
    assert lines[1] == "lr auto   0.001: validation top-1 75.00 % after 4 epochs" and "diverged" in lines[4]
    assert lines[-1] == "lr auto   0.001 is taken"
    scores.clear()
    with pytest.raises(ValueError, match="diverges at every rate that --lr auto tries: 0.0005, "):
        choose_rate(tiny(folder), tmp_path, lines.append)


@pytest.mark.slow
def test_lr_auto_and_a_grid_leave_the_test_part_closed(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("abm_vision.tune.rate.SWEPT", (1e-3, 1e-2))
    code, out, err = answer([*words(folder, "--out", tmp_path, lr="auto", epochs=1)], capsys, main)
    assert code == 0 and out.count("lr auto") == 3 and "of 12 test images" in out, err
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")]
    assert sorted((r["config"]["evaluate"], r["test"] is None) for r in results) == [
        ("test", False),
        ("val", True),
        ("val", True),
    ]
    code, _, err = answer(words(folder, lr="auti"), capsys, main)
    assert code == 2 and "auti" in err


@pytest.mark.slow
def test_the_real_command(folder, tmp_path):
    command = [sys.executable, "-m", "abm_vision.tune", *words(folder, "--out", tmp_path, epochs=1, workers=1)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "next:" in done.stdout, done.stderr


# ----------------------------------------------------------------------------------------------- predict, evaluate


def test_predict_equals_the_model_by_hand(finished, folder):
    result, _ = finished
    paths = sorted((folder / "test").glob("*/*.png"))
    torch.manual_seed(0)
    model = load_adapter(create_backbone("test_vit", 3, 32, "none")[0], f"{result['folder']}/adapter").eval()
    pre = Preprocessing(**result["preprocessing"])
    with torch.no_grad():
        pixels = torch.cat([pre.resize([read_photo(path)]) for path in paths])
        expected = model(pre.normalise(pixels)).softmax(-1)
    rows = predict(result["folder"], paths, top=2)
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, probabilities in zip(rows, expected, strict=True):
        order = probabilities.argsort(descending=True)[:2].tolist()
        assert [one["label"] for one in row["top"]] == order and row["class"] == sorted(COLOURS)[order[0]]
        assert [one["probability"] for one in row["top"]] == pytest.approx(probabilities[order].tolist(), rel=1e-4)
    right = sum(row["class"] == path.parent.name for row, path in zip(rows, paths, strict=True))
    assert right == result["test"]["correct"]


def test_more_images_than_a_chunk_keep_their_order(finished, folder, monkeypatch):
    monkeypatch.setattr("abm_vision.images.data.CHUNK", 5)
    paths = sorted((folder / "test").glob("*/*.png"))
    rows = predict(finished[0]["folder"], paths)
    assert [row["image"] for row in rows] == list(map(str, paths))
    alone = predict(finished[0]["folder"], paths[7:8])[0]
    assert rows[7]["class"] == alone["class"]
    assert rows[7]["probability"] == pytest.approx(alone["probability"], rel=1e-4)


def test_predict_on_folders(finished, folder, capsys, tmp_path):
    adapter = finished[0]["folder"]
    code, out, err = answer(["predict", adapter, folder / "test" / "grün", "--top", 3, "--csv"], capsys, main)
    lines = out.splitlines()
    assert code == 0 and lines[0] == "image,rank,class,probability" and len(lines) == 13, err
    assert lines[1].startswith(f"{folder}/test/grün/0.png,1,")
    bad = tmp_path / "x.png"
    bad.write_text("no picture")
    code, out, err = answer(["predict", adapter, bad, folder / "test" / "grün"], capsys, main)
    assert code == 2 and "1 of 5 files cannot be read" in err and not out
    code, out, err = answer(["predict", adapter, bad, folder / "test" / "grün", "--skip-broken"], capsys, main)
    assert code == 0 and len(out.splitlines()) == 4 and err.startswith(f"left out: {bad}")
    (tmp_path / "none").mkdir()
    code, _, err = answer(["predict", adapter, tmp_path / "none"], capsys, main)
    assert code == 2 and "none holds no picture" in err


def test_scores_by_class_are_those_of_a_plain_count():
    found = Evaluation(
        classes=("a", "b", "c"),
        paths=[Path(f"{k}.png") for k in range(6)],
        labels=np.array([0, 0, 0, 1, 1, 1]),
        predicted=np.array([0, 1, 1, 1, 0, 2]),
        probability=np.array([0.9, 0.5, 0.8, 0.7, 0.6, 0.95]),
        part=None,
    )
    assert found.top1 == pytest.approx(2 / 6) and found.confusion.tolist() == [[1, 2, 0], [1, 1, 1], [0, 0, 0]]
    assert found.mistakes == [5, 2, 4, 1]
    a, b, c = found.rows()
    assert a == {"class": "a", "images": 3, "correct": 1, "recall": 1 / 3, "precision": 1 / 2, "taken_for": "b"}
    assert (b["recall"], b["precision"], b["taken_for"]) == (1 / 3, 1 / 3, "a")
    assert c == {"class": "c", "images": 0, "correct": 0, "recall": None, "precision": 0.0, "taken_for": None}


@pytest.mark.figures
def test_evaluate(finished, folder, capsys, tmp_path):
    result = finished[0]
    found = evaluate(result["folder"], folder)
    assert found.part == "test" and found.top1 == pytest.approx(result["test"]["top1"])
    root = shutil.copytree(folder / "test", tmp_path / "mine")
    shutil.move(root / "grün" / "0.png", root / "red cat" / "moved.png")
    code, out, err = answer(["evaluate", result["folder"], root, "--out", tmp_path / "out"], capsys, main)
    assert code == 0 and re.match(r"top-1 \d+\.\d\d %: \d+ of 12 images\n", out), err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"confusion.png", "mistakes.png", "predictions.csv", "evaluation.json"}
    numbers = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert np.sum(numbers["confusion"]) == 12 and np.sum(numbers["confusion"], 1).tolist() == [3, 5, 4]
    assert len((tmp_path / "out" / "predictions.csv").read_text().splitlines()) == 13
    sheet = np.asarray(Image.open(tmp_path / "out" / "mistakes.png").convert("RGB")).reshape(-1, 3)
    assert (sheet.std(1) > 20).mean() > 0.05  # colours, which captions have none of
    (root / "purple").mkdir()
    shutil.copy(root / "grün" / "1.png", root / "purple")
    code, _, err = answer(["evaluate", result["folder"], root, "--out", tmp_path / "out"], capsys, main)
    assert code == 2 and "has pictures of purple, which" in err and "it has grün, red cat, синий" in err


def test_an_adapter_of_vtab_has_numbers_for_classes(vit_run, tmp_path):
    classifier = load_classifier(vit_run[2]["folder"])
    assert classifier.classes == tuple(map(str, range(16)))
    photos(tmp_path / "x", 1)
    (tmp_path / "x" / "grün").rename(tmp_path / "x" / "3")
    with pytest.raises(ValueError, match="has pictures of red cat, синий, which"):
        evaluate(vit_run[2]["folder"], tmp_path / "x")


def test_a_slash_at_the_end_is_not_another_run():
    """As a shell completes the name of a folder."""
    with_, without = make_config(data="my/photos/", weights="none/"), make_config(data="my/photos", weights="none")
    assert with_ == without and with_.run_name() == without.run_name() and make_config(data="/").data == "/"
