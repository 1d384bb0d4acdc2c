"""The command line as a person uses it."""

import json
import re
import shutil
import signal
import time
from dataclasses import replace

import pytest
from helpers import FLAGS, answer, refused, start, tiny
from PIL import Image

import vtab_tasks
from abm_vision.vtab import run
from abm_vision.vtab.__main__ import COMMANDS, main
from vtab_tasks.tasks import Edition, Part, get_task

# A run


def test_the_real_command(tmp_path, capsys):
    process = start(*FLAGS, "--task", "dsprites_loc", "--out", tmp_path / "results")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert err == ""  # no progress bars where there is no terminal, no warnings
    lines = out.splitlines()
    assert lines[0].startswith("settings  ") and "model test_vit" in lines[0] and "weight_decay" not in lines[0]
    stages = [line.split()[0] for line in lines]
    assert stages == ["settings", "device", "data", "weights", "abm", "epoch", "epoch", "abm", "dsprites_loc"]
    assert "rendered" in lines[-1] and re.search(r"top-1 \d+\.\d\d % of 60 test images", lines[-1])
    (folder,) = (tmp_path / "results").iterdir()
    assert str(folder) in lines[-1] and (folder / "result.json").is_file()
    # A second time it is read, not run; as JSON and nothing else.
    code, out, err = answer([*FLAGS, "--out", tmp_path / "results", "--diagnose"], capsys)
    assert (code, err) == (0, "")
    assert "finished before" in out and re.search(r"^all +0\.\d{4} +0\.\d{4} +0\.\d{4} +1\.000$", out, re.MULTILINE)
    assert (folder / "information_loss.png").is_file()
    code, out, err = answer([*FLAGS, "--out", tmp_path / "results", "--json"], capsys)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["test"]["count"] == 60


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(tiny(epochs=4, batch_size=25), tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    "how, code",
    [(signal.SIGKILL, -9), (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_killed_and_interrupted_runs_go_on(tmp_path, capsys, unbroken, how, code):
    words = [*FLAGS, "--epochs", 4, "--batch-size", 25]
    process = start(*words, "--out", tmp_path)
    for line in process.stdout:
        if line.startswith("epoch   2"):
            break
    process.send_signal(how)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err and ("resumes from its last checkpoint" in err) is (how != signal.SIGKILL)
    (folder,) = tmp_path.iterdir()
    assert {p.name for p in folder.iterdir() if p.name[0] != "."} == {"config.json", "checkpoint.pt"}
    code, out, err = answer([*words, "--out", tmp_path], capsys)
    assert code == 0, err
    assert re.search(r"resumed   after epoch [123] of 4", out)
    resumed = json.loads((folder / "result.json").read_text())
    assert resumed["loss_per_step"] == unbroken["loss_per_step"] and resumed["test"] == unbroken["test"]


def test_settings_from_a_file_and_flags_win(tmp_path, capsys):
    assert main([*FLAGS, "--out", str(tmp_path), "--quiet"]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == "" and quiet.out.count("\n") == 1
    (folder,) = tmp_path.iterdir()
    words = ["--config", str(folder / "result.json"), "--seed", "5", "--epochs", "1", "--out", str(tmp_path / "b")]
    assert main([*words, "--json"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["seed"], config["epochs"], config["model"]) == (5, 1, "test_vit")


def test_every_setting_is_a_flag_with_help():
    text = COMMANDS[""].parser().format_help()
    for name in tiny().to_dict():
        assert f"--{name.replace('_', '-')} " in text
    for flag in ("--out", "--json", "--quiet", "--rerun", "--config", "list", "predict"):
        assert flag in text


# list and predict


def test_list(capsys, tmp_path):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("dsprites_ori"))
    assert row.split()[1:4] == ["structured", "16", "73728"] and row.endswith("  rendered: drawn offline")


def listed(data_dir, capsys):
    """What `list` finds of dsprites_loc, and what it says in its line."""
    code, out, err = answer(["list", "--data-dir", data_dir, "--json"], capsys)
    assert (code, err) == (0, "")
    (row,) = [row for row in json.loads(out) if row["task"] == "dsprites_loc"]
    code, out, _ = answer(["list", "--data-dir", data_dir], capsys)
    assert code == 0
    return row["data"], next(line for line in out.splitlines() if line.startswith("dsprites_loc"))


def test_list_says_what_a_run_would_accept(community, tmp_path, capsys):
    drawn = {"source": "rendered", "location": None, "refused": None}
    place = str(community)
    data, line = listed(community.parents[1], capsys)
    assert data == [{"source": "folder", "location": place, "refused": None}, drawn]
    assert line.endswith(f"folder: {place} (accepted), rendered: drawn offline")
    shutil.move(community / "images/test/000003.png", tmp_path / "away.png")
    (data, other), line = listed(community.parents[1], capsys)
    words = [*FLAGS, "--quiet", "--data-dir", community.parents[1], "--out", tmp_path / "out"]
    assert refused(words, capsys) == f"abm-vtab: error: {data['refused']}\n" and other == drawn
    assert f"(REFUSED: {data['refused']})" in line
    (community / "test.txt").unlink()  # the rest of an interrupted download; the message has several lines
    (data, _), line = listed(community.parents[1], capsys)
    assert "does not hold dsprites_loc/test in the community layout" in data["refused"] and data["refused"] in line
    assert "no folder" in refused(["list", "--data-dir", tmp_path / "absent"], capsys)


def test_predict(capsys, tmp_path):
    result = run(tiny(epochs=1), tmp_path)
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    words = ["predict", result["folder"], str(tmp_path / "black.png"), "--device", "cpu"]
    assert main(words) == 0
    assert re.fullmatch(r".*black\.png: \d+ 0\.\d{3}\n", capsys.readouterr().out)
    assert main([*words, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert set(row) == {"image", "task", "trained_on", "label", "class", "probability", "top"}
    assert row["task"] == "dsprites_loc" and row["trained_on"] == "rendered" and row["class"] == str(row["label"])
    assert main(["predict", result["folder"], str(tmp_path / "no.png")]) == 2
    assert "no image" in capsys.readouterr().err


# Bad input: exit code 2, one message, no traceback


@pytest.mark.parametrize(
    "words, message",
    [
        (["--task", "dsprites_lok"], "unknown task 'dsprites_lok'; did you mean dsprites_loc"),
        (["--model", "vit_smal_patch14_dinov2"], "timm has no model 'vit_smal_patch14_dinov2'; did you mean vit_small"),
        (["--rank", "0"], "rank is 0; it must be 1 or more"),
        (["--rank", "100"], r"rank 100 for blocks\.0\.attn\.qkv \(192, 64\): allowed are 1 \.\. 64"),
        (["--rank", "many"], "invalid int value: 'many'"),
        (["--device", "cuda:77"], "device is 'cuda:77'; this machine has"),
        (["--qkv", "k"], "invalid choice: 'k'"),
        (["--learning-rate", "1"], r"unrecognized arguments: --learning-rate 1; did you mean --lr\?"),
        (["--lerning-rate=1"], r"unrecognized arguments: --lerning-rate=1; did you mean --lr\?"),
        (["--epoch-s", "3"], r"unrecognized arguments: --epoch-s 3; did you mean --epochs\?"),
        (["suite", "--task", "svhn"], r"unrecognized arguments: --task svhn; did you mean --tasks\?"),
        (["suit", "--tasks", "svhn"], r"there is no command suit; did you mean suite\?"),
        (["--zzz"], "unrecognized arguments: --zzz\n"),
        (["--targets", "attn.qkv,fc3"], "target 'fc3' matches no projection inside a block"),
        (["--abm-layers", "first"], r"layers names first; the boundaries of this model are blocks\.0\.mlp\.act"),
        (["--weights", "absent.safetensors"], r"no file absent\.safetensors"),
        (["--init", "abm_aline"], "init is 'abm_aline'; allowed are kaiming.*did you mean abm_aligned"),
        (
            ["--init", "pissa", "--qkv", "qv"],
            "init pissa cannot leave k alone inside a fused qkv: use qkv full, or kaiming",
        ),
        (["--init", "abm_tuned", "--abm-reference", "absent"], "no adapter_config.json in absent"),
        (["--abm-reference", "absent"], "abm_reference is given, but init abm uses no reference"),
        (
            ["--init", "orthogonal"],
            "abm_samples, abm_steps are given, but init orthogonal has no use for them: leave them out",
        ),
        (["--init", "abm_aligned", "--align-match", "2"], r"match is 2\.0; it must lie in"),
        (["--abm-fit", "block"], "invalid choice: 'block'"),
        (["--image-size", "33"], r"does not run at 33 px .* divisible by patch size \(16\)"),
        (["--source", "folder"], 'source="folder" needs data_dir'),
        (["--config", "absent.json"], r"there is no absent\.json; write the settings as flags"),
        (["predict", "absent", __file__], r"test_cli\.py cannot be read as an image"),
        (["predict", "x.png"], r"required: IMAGE\|FOLDER"),
        (["--batch", "8"], "unrecognized arguments: --batch 8"),
        (["list", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_refused(words, message, capsys, tmp_path):
    commands = ("list", "predict", "suite")
    words = words if words[0] in (*commands, "suit") else [*FLAGS, "--quiet", "--out", tmp_path / "out", *words]
    assert re.search(message, refused(words, capsys))


def test_config_file_and_preset_exclude_each_other(capsys, tmp_path):
    assert "give one of them" in refused(["--config", tmp_path / "x.json", "--preset", "paper"], capsys)


def test_weights_that_are_nowhere(capsys, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    began = time.monotonic()
    err = refused([*FLAGS, "--weights", "auto", "--quiet", "--out", tmp_path / "out"], capsys)
    assert "No pretrained weights for test_vit" in err and "Three ways out" in err
    assert time.monotonic() - began < 20


def test_output_in_the_way(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "free space or choose another place" in refused([*FLAGS, "--quiet", "--out", tmp_path / "file"], capsys)


def test_file_of_another_schema(capsys, tmp_path):
    (tmp_path / "old.json").write_text('{"schema": 0, "config": {"task": "dsprites_loc"}}')
    assert "has schema 0, this version reads 6" in refused(["--config", tmp_path / "old.json"], capsys)


def test_settings_in_yaml(capsys, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: dsprites_ori\nlr: 1e-3\nrank: 4\n")
    code, out, _ = answer(["--config", file, "--rank", "2", "--print-config"], capsys)
    found = json.loads(out)["config"]
    assert code == 0 and (found["task"], found["lr"], found["rank"]) == ("dsprites_ori", 0.001, 2)


def test_some_settings_in_json(capsys, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"task": "dsprites_ori", "lr": 0.001}')
    code, out, _ = answer(["--config", file, "--print-config"], capsys)
    found = json.loads(out)["config"]
    assert code == 0 and (found["task"], found["lr"]) == ("dsprites_ori", 0.001)
    file.write_text('{"lrr": 1}')
    assert "unknown settings lrr" in refused(["--config", file], capsys)


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr: [1", "mine.yaml is not YAML"),
        ("- lr", "mine.yaml holds no settings by name, such as `lr: 1e-3`"),
        ("lr: high", "lr is 'high'; it must be of type float"),
        ("rate: 1", "unknown settings rate"),
        (None, "there is no"),
    ],
)
def test_bad_settings_in_yaml(text, message, capsys, tmp_path):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    assert message in refused(["--config", tmp_path / "mine.yaml"], capsys)


@pytest.fixture
def community(tmp_path, monkeypatch):
    """A folder in the community's layout, of 25 images for training and 20 for testing."""
    small = Edition((("train", 60),), Part("train", 0, 20), Part("train", 30, 35), Part("train", 40, 60))
    monkeypatch.setitem(vtab_tasks.TASKS, "dsprites_loc", replace(get_task("dsprites_loc"), editions=(small,)))
    folder = tmp_path / "data" / "vtab-1k" / "dsprites_loc"
    for split, count, red in (("train800val200", 25, 0), ("test", 20, 200)):
        (folder / "images" / split).mkdir(parents=True)
        names = [f"images/{split}/{k:06d}.png" for k in range(count)]
        for k, name in enumerate(names):
            Image.new("RGB", (64, 64), (red, k, 0)).save(folder / name)
        (folder / f"{split}.txt").write_text("".join(f"{name} 3\n" for name in names))
    return folder


def spoil(folder, number, line):
    lines = (folder / "train800val200.txt").read_text().splitlines()
    lines[number - 1] = line
    (folder / "train800val200.txt").write_text("\n".join(lines) + "\n")


def test_community_folder_runs(community, capsys, tmp_path):
    words = [*FLAGS, "--epochs", 1, "--data-dir", community.parents[1], "--out", tmp_path / "out", "--json"]
    assert main([str(w) for w in words]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["data"]["test"]["source"] == "folder" and result["data"]["train"]["images"] == 25
    assert result["test"]["count"] == 20


def test_images_that_are_trained_and_tested_on_are_counted_in_the_result(community, capsys, tmp_path):
    shutil.copy(community / "images/train800val200/000003.png", community / "images/test/000007.png")
    words = [*FLAGS, "--epochs", 1, "--data-dir", community.parents[1], "--out", tmp_path / "out", "--json"]
    assert main([str(w) for w in words]) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert output.err.startswith("abm-vtab: warning: ") and "1 of its 20 images has the same content" in output.err
    assert "1 of its 20 images has the same content as a training image" in result["data"]["test"]["description"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("images/train800val200/000099.png 3", r"train800val200\.txt:17: there is no .*000099\.png: fetch the missing"),
        (
            "images/train800val200/broken.png 3",
            r"train800val200\.txt:17: .*broken\.png is truncated, or no JPEG or PNG",
        ),
        ("images/train800val200/000000.png 4", r"txt:17: .*000000\.png is in line 1 too, with label 3: leave one"),
        ("../x.png 3", r"txt:17: \.\./x\.png leaves the folder: write it relative to the list"),
        ("images/train800val200/000000.png 16", r"txt:17: the label 16 is out of range: dsprites_loc has classes 0 to"),
        ("images/train800val200/000000.png", r"txt:17: .* is not of the form"),
    ],
)
def test_community_folder_with_a_bad_line(community, line, message, capsys, tmp_path):
    (community / "images" / "train800val200" / "broken.png").write_bytes(b"no picture")
    spoil(community, 17, line)
    words = [*FLAGS, "--quiet", "--source", "folder", "--data-dir", community.parents[1], "--out", tmp_path / "out"]
    assert re.search(message, refused(words, capsys))


@pytest.mark.parametrize("source", ["auto", "folder", "tfds"])
def test_data_folder_without_the_layout(source, capsys, tmp_path):
    words = [*FLAGS, "--quiet", "--source", source, "--data-dir", tmp_path, "--out", tmp_path / "out"]
    err = refused(words, capsys)
    assert str(tmp_path) in err and ("train800val200.txt" in err or "prepared" in err)
