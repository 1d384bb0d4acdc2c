"""The harness: one run from a configuration to its files, resumed, refused, and read back."""

import dataclasses
import hashlib
import io
import json
import math
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from conftest import TINY, build_vit, full_disk
from helpers import break_off, tiny
from PIL import Image
from pydantic import TypeAdapter

import vtab_tasks
from abm_vision import VIT, add_lora, create_backbone, information_loss, initialize_lora, load_adapter, save_adapter
from abm_vision.images import answers, data, train
from abm_vision.images.predict import predict
from abm_vision.runs import checkpoint
from abm_vision.runs.device import resolve_device
from abm_vision.runs.folder import open_folder, settle_precision
from abm_vision.runs.records import read_config, settings_of
from abm_vision.vtab import HARNESS, PRESETS, RunConfig, harness, make_config, run
from abm_vision.vtab.results import model_card


@pytest.fixture
def finished(vit_run):
    return vit_run


# A run and its files


def test_result_says_everything(finished):
    config, out, result = finished
    folder = out / config.run_name()
    written = json.loads((folder / "result.json").read_text())
    assert {**written, "folder": str(folder)} == result
    assert written["schema"] == 6 and written["config"] == config.to_dict()
    assert written["test"]["count"] == 60 and written["test"]["split_size"] == 73_728
    assert written["test"]["top1"] == written["test"]["correct"] / 60
    assert written["data"]["train"]["images"] == 1000 and written["data"]["test"]["source"] == "rendered"
    assert "not the official pixel data" in written["data"]["test"]["description"]
    assert written["weights"] == {
        "name": "test_vit.r160_in1k",
        "origin": "none",
        "location": "random weights",
        "sha256": None,
    }
    assert len(written["loss_per_step"]) == 8 and len(written["seconds_per_epoch"]) == 2
    assert set(written["top1_per_epoch"]) == {"1", "2"} and written["top1_per_epoch"]["2"] == written["test"]["top1"]
    assert written["abm"]["config"]["steps"] == 2 and len(written["abm"]["layers"]) == 6
    assert {"data", "weights", "lora", "init", "train", "test"} == set(written["seconds"])
    assert written["images_per_second"]["train"] > 0 and written["peak_memory_mib"] > 100
    environment = written["environment"]
    assert environment["packages"]["timm"] == timm.__version__
    assert torch.__version__.startswith(environment["packages"]["torch"])
    assert set(environment) == {"python", "packages", "commit", "device", "threads", "platform"}
    lora = 6 * 4 * ((64 + 192) + (64 + 64) + (64 + 192) + (192 + 64))
    assert written["trainable_parameters"] == lora + 64 * 16 + 16


def test_folder_holds_result_pictures_and_adapter_and_no_checkpoint(finished):
    config, out, result = finished
    folder = out / config.run_name()
    pictures = {"curves.png", "answers.png"}
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json", "result.json", "adapter", *pictures}
    assert all(matplotlib.image.imread(folder / name).std() > 0.05 for name in pictures)
    card = (folder / "adapter" / "README.md").read_text()
    assert model_card(result) in card and "rendered" in card and f"{100 * result['test']['top1']:.2f} %" in card
    names = {p.name for p in (folder / "adapter").iterdir()}
    assert names == {"README.md", "abm.json", "adapter_config.json", "adapter_model.safetensors"}


def test_top1_is_what_the_saved_adapter_scores(finished):
    """Loaded by hand on the seed's own backbone and counted in a plain loop."""
    config, _, result = finished
    torch.manual_seed(config.seed)
    backbone, _ = create_backbone(config.model, 16, 32, "none")
    model = load_adapter(backbone, f"{result['folder']}/adapter").eval()
    test = vtab_tasks.load("dsprites_loc", "test", source="rendered").subset(60, 0)
    pre = data.Preprocessing(**result["preprocessing"])
    correct = 0
    with torch.no_grad():
        for image, label in test:
            correct += int(model(pre.normalise(pre.resize(image[None]))).argmax()) == label
    assert correct == result["test"]["correct"]


def test_same_seed_same_result_and_another_seed_another(tmp_path, finished):
    config, _, result = finished
    again = run(config, tmp_path)
    other = run(tiny(seed=1, eval_epochs=1), tmp_path)
    assert again["loss_per_step"] == result["loss_per_step"] and again["test"] == result["test"]
    assert other["loss_per_step"] != result["loss_per_step"]


def test_finished_run_is_not_run_again_unless_asked(finished, monkeypatch, tmp_path):
    config, out, result = finished
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    lines = []
    monkeypatch.setattr("abm_vision.runs.run._make", lambda *a: pytest.fail("ran again"))
    assert run(config, out, say=lines.append) == result
    assert "finished before; --rerun repeats it" in lines[0]
    monkeypatch.undo()
    assert run(config, tmp_path, rerun=True)["loss_per_step"] == result["loss_per_step"]


KILLED = [
    {},
    {"init": "kaiming", "dropout": 0.3, "drop_path": 0.2, "qkv": "qv"},
    {"init": "pissa"},  # of these three more belongs to the initialisation than A and B
    {"init": "eva"},
    {"init": "mica"},
    {"init": "abm_aligned"},
]
QUICK = [(0, {}), (1, {"init": "pissa"})]
RARE = [(stop, changes) for stop in (0, 1) for changes in KILLED if (stop, changes) not in QUICK]


@pytest.mark.parametrize(
    ("stop_after", "changes"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in RARE)]
)
def test_killed_run_goes_on_to_the_same_result_bit_for_bit(tmp_path, monkeypatch, stop_after, changes):
    config = tiny(**changes)
    unbroken = run(config, tmp_path / "unbroken")
    lines, original = [], checkpoint.save

    def killed(run, optimiser, progress, notes):
        if progress.epoch > stop_after:
            raise KeyboardInterrupt
        original(run, optimiser, progress, notes)

    monkeypatch.setattr(checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "broken")
    monkeypatch.undo()
    resumed = run(config, tmp_path / "broken", say=lines.append)
    assert any("resumed   after epoch 1 of 2" in line for line in lines) is bool(stop_after)
    assert resumed["loss_per_step"] == unbroken["loss_per_step"]
    assert resumed["test"] == unbroken["test"]
    assert {**(resumed["abm"] or {}), "seconds": 0} == {**(unbroken["abm"] or {}), "seconds": 0}
    files = [f"{r['folder']}/adapter/adapter_model.safetensors" for r in (resumed, unbroken)]
    assert open(files[0], "rb").read() == open(files[1], "rb").read()


@pytest.mark.slow
@pytest.mark.figures
def test_diagnosis_of_a_new_a_resumed_and_a_finished_run_is_the_same(tmp_path, monkeypatch):
    config, lines = tiny(init="lora_ga"), []
    new = run(config, tmp_path / "new", diagnose=True, say=lines.append)
    assert any(line.startswith("information loss") and "attn.qkv" in line for line in lines)
    finished = run(config, tmp_path / "old")
    assert finished["information_loss"] is None and "information_loss.png" not in {
        p.name for p in (tmp_path / "old" / config.run_name()).iterdir()
    }
    added = run(config, tmp_path / "old", diagnose=True)
    break_off(config, tmp_path / "broken", monkeypatch)
    resumed = run(config, tmp_path / "broken", diagnose=True)
    for result in (new, added, resumed):
        found = json.loads(open(f"{result['folder']}/result.json").read())["information_loss"]
        for moment in ("before", "after", "after_on_seen"):
            assert {**found[moment], "seconds": 0} == {**new["information_loss"][moment], "seconds": 0}
        assert matplotlib.image.imread(f"{result['folder']}/information_loss.png").std() > 0.05
        assert result["loss_per_step"] == new["loss_per_step"] and result["test"] == new["test"]
    assert found["before"]["overall"]["loss"] > 0.9 > found["after_on_seen"]["overall"]["loss"]
    assert found["before"]["samples"] == 64


def test_diagnosis_by_hand(tmp_path):
    """The information loss of the initialisation on the last 64 images of the shuffled training set, in one batch."""
    config = tiny(init="gaussian", epochs=1)
    found = run(config, tmp_path, diagnose=True)["information_loss"]["after"]["overall"]["loss"]
    torch.manual_seed(config.seed)
    backbone, _ = create_backbone(config.model, 16, 32, "none")
    pre = data.preprocessing_for(backbone, 32)
    train_set = vtab_tasks.load("dsprites_loc", "train800val200", source="rendered")
    pixels, labels = data.load_all(train_set, pre)
    (order,) = data.shuffled(1000, 1000, config.seed, 0)
    torch.manual_seed(config.seed)
    model = add_lora(backbone, config.rank, config.alpha)
    initialize_lora(model, "gaussian")
    batch = (pre.normalise(pixels[order[-64:]]), labels[order[-64:]])
    assert information_loss(model, [batch], VIT.loss_fn).overall.loss == pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(
    ("normalisation", "mean", "std"),
    [
        ("model", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # of orig_in21k, as timm has it
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("none", (0, 0, 0), (1, 1, 1)),
    ],
)
def test_normalisation(normalisation, mean, std):
    backbone = timm.create_model("vit_base_patch16_224.orig_in21k", depth=1)
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = data.preprocessing_for(backbone, 16, normalisation).normalise(pixels)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("interpolation", "pil"), [("model", Image.BICUBIC), ("bilinear", Image.BILINEAR)])
def test_images_of_any_size_are_resized_like_pillow(interpolation, pil):
    backbone = timm.create_model("vit_base_patch16_224.orig_in21k", depth=1)
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 70), (33, 20), (40, 70))]
    found = data.preprocessing_for(backbone, 24, "model", interpolation).resize(images)
    assert found.shape == (3, 3, 24, 24) and found.dtype == torch.uint8
    for image, resized in zip(images, found, strict=True):
        expected = torch.tensor(np.asarray(Image.fromarray(image).resize((24, 24), pil))).permute(2, 0, 1)
        assert (resized.float() - expected.float()).abs().mean() < 0.6  # Pillow rounds between its two passes
    same = data.preprocessing_for(backbone, 24, "model", interpolation).resize(np.stack(images[::2]))
    assert torch.equal(same, found[::2])


def test_preprocessing_is_a_recorded_option(tmp_path):
    result = run(tiny(normalisation="none", interpolation="bilinear", epochs=1), tmp_path)
    recorded = result["preprocessing"]
    assert (recorded["mean"], recorded["interpolation"]) == ([0, 0, 0], "bilinear")
    assert result["config"]["normalisation"] == "none"


@pytest.mark.slow
def test_tuned_reference_is_made_once_counted_and_left_out(tmp_path):
    short = {**TINY, "epochs": 1}
    config, lines = make_config(**short, init="abm_tuned"), []
    result = run(config, tmp_path, say=lines.append)
    plain = make_config(**{k: v for k, v in short.items() if not k.startswith("abm_")}, init="kaiming")
    reference = tmp_path / plain.run_name()
    tuned = HARNESS.kept.read(reference)
    assert result["reference"] == {"folder": str(reference), "seconds": result["seconds"]["reference"]}
    assert result["seconds"]["reference"] == tuned["seconds"]["init"] + tuned["seconds"]["train"]
    assert result["abm"]["reference"] == "adapter 'reference'" and result["abm"]["before"]["match"] < 1
    adapter = json.loads((tmp_path / config.run_name() / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and not (tmp_path / config.run_name() / "adapter" / "reference").exists()
    assert any("reference tuned first" in line for line in lines)
    # Given by its folder, or by its adapter alone: then what it cost is not known.
    given = run(dataclasses.replace(config, abm_reference=str(reference)), tmp_path / "given")
    alone = run(dataclasses.replace(config, abm_reference=str(reference / "adapter")), tmp_path / "alone")
    assert given["loss_per_step"] == alone["loss_per_step"] == result["loss_per_step"]
    assert given["seconds"]["reference"] == result["seconds"]["reference"] and "reference" not in alone["seconds"]
    assert alone["reference"] == {"folder": str(reference / "adapter"), "seconds": None}


def test_diagnosis_needs_images_besides_those_of_the_calibration(tmp_path):
    with pytest.raises(ValueError, match="needs 64 training samples besides.*abm_samples 950 of 1000: lower it"):
        run(tiny(abm_samples=950), tmp_path, diagnose=True)


def test_diagnosis_is_not_added_from_other_data(tmp_path, monkeypatch):
    config = tiny(init="kaiming", epochs=1)
    run(config, tmp_path)
    other = harness.content
    monkeypatch.setattr(harness, "content", lambda *a: {**other(*a), "labels": "tfds"})
    with pytest.raises(ValueError, match=r"made with other content: training labels \(rendered, code \w+ then"):
        run(config, tmp_path, diagnose=True)


def test_start_that_comes_out_differently_is_not_resumed(tmp_path, monkeypatch):
    config = tiny(init="pissa")
    break_off(config, tmp_path, monkeypatch)
    monkeypatch.setattr("abm_vision.runs.initialise.fingerprint", lambda model: "another")
    with pytest.raises(ValueError, match="comes out differently now.*--rerun, or deleting its folder, starts afresh"):
        run(config, tmp_path)


def test_reference_tuned_on_other_weights(tmp_path):
    reference = run(tiny(init="kaiming", epochs=1), tmp_path)["folder"]
    path = f"{reference}/adapter/abm.json"
    content = json.loads(open(path).read())
    content["weights"]["sha256"] = "another"
    open(path, "w").write(json.dumps(content))
    with pytest.raises(ValueError, match=r"was tuned on random weights \(sha256 another\), this run has"):
        run(tiny(init="abm_tuned", abm_reference=reference, epochs=1), tmp_path)


def test_reference_of_another_task_and_rank(tmp_path):
    other = run(tiny(task="dsprites_ori", rank=2, init="kaiming", epochs=1), tmp_path)
    result = run(tiny(init="abm_tuned", abm_reference=other["folder"], abm_fit="local", epochs=1), tmp_path)
    assert result["abm"]["before"]["match"] < 1 and result["abm"]["after"]["loss"] < result["abm"]["before"]["loss"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    out = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        break_off(tiny(), out, patch)
    return out


@pytest.fixture
def broken_off(killed, tmp_path):
    """A run that was killed after its first epoch: configuration and folder."""
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    return tiny(), tmp_path


def test_run_does_not_go_on_with_other_weights_or_data(broken_off, monkeypatch):
    config, out = broken_off
    other = harness.content
    monkeypatch.setattr(harness, "content", lambda *a: {**other(*a), "images": "tfds"})
    with pytest.raises(ValueError, match=r"training images \(rendered, code \w+ then, tfds now\).*--rerun"):
        run(config, out)
    assert run(config, out, rerun=True)["test"]["count"] == 60


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("progress", {"epoch": "one"}, "lacks losses"),
        ("progress", {"epoch": "one", "losses": [], "seconds": [], "accuracies": {}}, "epoch is 'one'"),
        ("notes", "[]", r"it is \[\]"),
        ("notes", '{"origin": 3, "information_loss": null}', "origin is 3"),
        ("trained", {"other": torch.zeros(1)}, "does not fit this model"),
        ("trained", 3, "is not whole"),
        ("optimiser", {"state": {}}, "does not fit this model"),
    ],
)
def test_checkpoint_with_a_field_of_another_type(broken_off, part, value, message):
    config, out = broken_off
    path = out / config.run_name() / "checkpoint.pt"
    state = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
    write_checkpoint(path, {**state, part: value})
    with pytest.raises(ValueError, match=rf"checkpoint\.pt.*{message}.*--rerun, or deleting its folder, starts afresh"):
        run(config, out)


def write_checkpoint(path, state):
    """A whole one, behind the SHA-256 of its content."""
    torch.save(state, path)
    path.write_bytes(hashlib.sha256(path.read_bytes()).digest() + path.read_bytes())


def test_flipped_bits_in_a_checkpoint_are_found(broken_off):
    config, out = broken_off
    path = out / config.run_name() / "checkpoint.pt"
    whole = path.read_bytes()
    for place in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged, its content has another checksum"):
            run(config, out)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", None])
def test_checkpoint_that_is_damaged_or_of_another_schema(broken_off, content):
    config, out = broken_off
    path = out / config.run_name() / "checkpoint.pt"
    write_checkpoint(path, {"schema": 0}) if content is None else path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"checkpoint\.pt (is damaged|has schema 0).*--rerun, or deleting its folder, starts afresh",
    ):
        run(config, out)


def test_precision_is_settled_once_a_run(broken_off, monkeypatch):
    config = tiny(precision="auto")
    folder = open_folder(broken_off[1], config)
    monkeypatch.setattr("abm_vision.runs.device.has_fast_bf16", lambda device: True)
    assert settle_precision(folder, config) == "bf16"
    monkeypatch.setattr("abm_vision.runs.device.has_fast_bf16", lambda device: False)
    assert settle_precision(folder, config) == "bf16"
    assert settle_precision(open_folder(broken_off[1], config), config) == "bf16"


def test_rerun_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    config = tiny(epochs=1)
    run(config, tmp_path)
    folder = tmp_path / config.run_name()
    monkeypatch.setattr("abm_vision.runs.run._initialise", lambda *a: pytest.fail("stopped"))
    with pytest.raises(pytest.fail.Exception, match="stopped"):
        run(config, tmp_path, rerun=True)
    assert {p.name for p in folder.iterdir()} == {".lock", "config.json"}


def test_test_split_is_opened_once_after_the_last_epoch(tmp_path, monkeypatch):
    events = []
    original, step = vtab_tasks.TaskData.images, torch.optim.AdamW.step

    def images(self, indices):
        events.append(self.split)
        return original(self, indices)

    monkeypatch.setattr(vtab_tasks.TaskData, "images", images)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: events.append("step") or step(*a, **k))
    run(tiny(), tmp_path)
    assert events[-1] == "test" and events.count("test") == 1 and "step" not in events[events.index("test") :]


def test_loss_that_is_not_finite_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"training loss is not finite in epoch \d+: lower --lr \(now 1e\+30\)"):
        run(tiny(lr=1e30, init="kaiming"), tmp_path)


def test_bf16_run(tmp_path):
    result = run(tiny(precision="bf16", epochs=1), tmp_path)
    assert result["precision"] == "bf16" and math.isfinite(result["loss_per_step"][-1])


def test_what_a_killed_process_left_half_written_is_removed(tmp_path, monkeypatch):
    config = tiny(init="kaiming", epochs=1)
    folder = open_folder(tmp_path, config)
    halves = [".checkpoint.pt.77.part.pt", ".result.json.77.part.json", ".config.json.77.part.json"]
    for name in halves:
        (folder / name).write_text("half")
    for name in (".adapter.77.part", "tensorboard"):
        (folder / name).mkdir()
        (folder / name / "file").write_text("half")
    run(config, tmp_path)
    whole = {".lock", "config.json", "result.json", "curves.png", "answers.png", "adapter"}
    assert {p.name for p in folder.iterdir()} == {*whole, ".config.json.77.part.json"}  # somebody may be writing it
    os.utime(folder / ".config.json.77.part.json", (0, 0))
    for name in ("checkpoint.pt", "failure.json"):  # killed after the result was written
        (folder / name).write_text("left")
    run(config, tmp_path)
    assert {p.name for p in folder.iterdir()} == whole


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = build_vit(num_classes=3, img_size=160).requires_grad_(False)
    model.blocks[1].mlp.fc1.weight[0, 0], model.norm.bias[0] = math.nan, math.inf
    torch.save(model.state_dict(), tmp_path / "test_vit.pth")
    message = r"test_vit\.pth, loaded into .*: blocks\.1\.mlp\.fc1\.weight and 1 other tensor hold NaN or infinite"
    with pytest.raises(ValueError, match=message):
        create_backbone("test_vit", 3, 32, tmp_path / "test_vit.pth")


# Settings


def test_defaults_are_the_quick_preset():
    assert make_config() == make_config(preset="quick") == RunConfig()


def test_paper_preset_is_the_published_recipe():
    """NOAH's LoRA baseline, as its row in the protocol table of the VTAB-1K papers has it."""
    config = make_config(preset="paper")
    assert config.model == "vit_base_patch16_224.orig_in21k" and config.image_size == 224
    assert (config.rank, config.alpha, config.targets, config.qkv) == (8, 8, "attn.qkv", "full")
    assert (config.epochs, config.warmup, config.batch_size) == (100, 0.1, 64)
    assert (config.lr, config.weight_decay, config.schedule) == (1e-3, 1e-4, "cosine")
    assert (config.dropout, config.drop_path, config.test_images) == (0.1, 0.1, 0)
    assert make_config(preset="paper", lr=2e-3).lr == 2e-3 and set(PRESETS) == {"quick", "paper"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"task": "dsprite_loc"}, r"unknown task 'dsprite_loc'; did you mean dsprites_loc"),
        ({"init": "kaimin"}, r"init is 'kaimin'; allowed are kaiming, .*abm_aligned; did you mean kaiming\?"),
        ({"preset": "slow"}, "preset is 'slow'; allowed are 'quick', 'paper'"),
        ({"rank": 0}, "rank is 0; it must be 1 or more"),
        ({"epochs": 0}, "epochs is 0"),
        ({"seed": -1}, "seed is -1; it must be 0 or more"),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must lie in \[0, 1\)"),
        ({"drop_path": -0.1}, "drop_path is -0.1"),
        ({"lr": 0.0}, "lr is 0.0; it must be positive and finite"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"alpha": 0.0}, "alpha is 0.0; it must be positive and finite"),
        ({"seed": 2**32}, r"seed is 4294967296; it must be less than 2 \*\* 32"),
        ({"rank": "8"}, "rank is '8'; it must be of type int"),
        ({"epochs": True}, "epochs is True; it must be of type int"),
        ({"abm_layers": 3}, "abm_layers is 3; it must be of type str"),
        ({"task": 5}, "task is 5; it must be of type str"),
        ({"abm_layers": "0"}, "layers is 0; it must be 1 or more, 'all', or a list"),
        ({"abm_margin": -1.0}, "margin is -1.0"),
        ({"abm_steps": 0}, "steps is 0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be finite"),
        ({"abm_margin": float("inf")}, "abm_margin is inf; it must be finite"),
        ({"alpha": 1e300}, r"alpha is 1e\+300; it must be 1e\+06 at most"),
        ({"warmup": 1.0}, "warmup is 1.0; it must lie in"),
        ({"eval_epochs": 13}, "eval_epochs is 13; it must be at most epochs, which is 12"),
        ({"qkv": "k"}, "qkv is 'k'; allowed are 'full', 'qv'"),
        ({"schedule": "linear"}, "schedule is 'linear'; allowed are 'cosine', 'constant'"),
        ({"precision": "fp16"}, "precision is 'fp16'; allowed are 'auto', 'bf16', 'fp32'"),
        ({"source": "web"}, "source is 'web'; allowed are 'auto', 'tfds', 'folder', 'rendered'"),
        ({"device": "cuda:99"}, "device is 'cuda:99'; this machine has .*cpu"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"learning_rate": 1}, "unknown settings learning_rate.*; a run has task, preset, model"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


def test_rerun_keeps_the_result_of_a_run_that_cannot_begin(tmp_path, monkeypatch):
    config = tiny(init="kaiming", epochs=1)
    folder = Path(run(config, tmp_path)["folder"])
    broken = dataclasses.replace(HARNESS, prepare=Mock(side_effect=ValueError("no data")))
    monkeypatch.setattr(harness, "HARNESS", broken)
    with pytest.raises(ValueError, match="no data"):
        run(config, tmp_path, rerun=True)
    assert (folder / "result.json").is_file() and (folder / "adapter").is_dir()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("config",), {}, "it lacks abm_batch_size, .*, workers"),
        (("config",), None, "config is None"),
        (("config", "task"), "dsprites_lok", "unknown task 'dsprites_lok'"),
        (("config", "init"), 5, "init is 5; allowed are kaiming"),
        (("config", "rank"), "8", "rank is '8'; it must be of type int"),
        (("seconds",), ..., "it lacks seconds"),
        (("seconds", "init"), ..., "it lacks seconds.init"),
        (("seconds",), {"init": "long"}, "seconds.init is 'long'"),
        (("test",), [], r"test is \[\]"),
        (("test", "top1"), 2.0, r"test\.top1 is 2\.0 \(.*less than or equal to 1\)"),
        (("test", "top1"), "0.5", r"test\.top1 is '0\.5'"),
        (("test", "top1"), math.nan, r"test\.top1 is nan \(.*finite"),
        (("test", "correct"), 61, "61 correct of 60 counted"),
        (("test", "correct"), True, r"test\.correct is True"),
        (("loss_per_step",), [1.0] * 3, "3 losses are not 4 in every epoch"),
        (("loss_per_step",), [], r"loss_per_step is \[\]"),
        (("loss_per_step", 0), None, r"loss_per_step\.0 is None"),
        (("loss_per_step", 0), math.inf, r"loss_per_step\.0 is inf"),
        (("seconds_per_epoch",), [], "0 times are not those of 1 epoch"),
        (("environment",), "a laptop", "environment is 'a laptop'"),
        (("data", "train"), None, "data.train is None"),
        (("data", "train", "source"), "web", r"data\.train\.source is 'web'"),
        (("weights", "sha256"), 5, r"weights\.sha256 is 5"),
        (("information_loss",), {"after": 1}, "it lacks information_loss.before"),
        (("reference_only",), "no", "reference_only is 'no'"),
        (("top1_per_epoch",), {"1": 3}, r"top1_per_epoch\.1 is 3"),
        (("surplus",), 1, "surplus is 1"),
    ],
)
def test_a_field_that_is_missing_or_of_another_type_or_range_is_named(one_epoch, tmp_path, place, value, message):
    content = json.loads(one_epoch.read_text())
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"result\.json: .*{message}.*; move its folder away"):
        HARNESS.kept.read(tmp_path)


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    return Path(run(tiny(init="kaiming", epochs=1), tmp_path_factory.mktemp("one"))["folder"]) / "result.json"


def test_different_settings_never_share_a_folder():
    base = RunConfig().to_dict()
    other = {"lr": 3e-3, "seed": 1, "init": "kaiming", "abm_margin": 0.1, "epochs": 3, "qkv": "qv"}
    names = {make_config(**{**base, key: value}).run_name() for key, value in other.items()}
    assert len(names | {RunConfig().run_name()}) == len(other) + 1


def test_files_with_settings_of_other_initialisations_are_read():
    """Files of before hold those of every initialisation, which a run has no use for."""
    before = {**tiny(init="kaiming").to_dict(), "abm_steps": 7, "align_norm": 3.0}
    assert TypeAdapter(settings_of(RunConfig)).validate_python(before) == before
    assert make_config(**before) == tiny(init="kaiming")


def test_config_file_of_another_schema_or_none(tmp_path):
    good = open_folder(tmp_path, tiny()) / "config.json"
    assert make_config(**read_config(good, 6)) == tiny()
    for text, message in (
        ('{"schema": 0, "config": {}}', r"has schema 0, this version reads 6"),
        ("[1, 2]", "holds no JSON object"),
        ('{"schema": 6, "config": [1]}', "config is .1. .Input should be a valid dictionary"),
        ("{", "is not JSON"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(tmp_path / "bad.json", 6)
    with pytest.raises(FileNotFoundError, match="there is no .*; write the settings as flags"):
        read_config(tmp_path / "absent.json", 6)


def test_result_of_another_schema_is_not_taken(tmp_path):
    folder = open_folder(tmp_path, tiny())
    (folder / "result.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match=r"has schema 7, this version reads 6; move its folder away"):
        run(tiny(), tmp_path)
    (folder / "result.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        HARNESS.kept.read(folder)


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*file.*\(.*\); free space or choose another place"):
        run(tiny(), tmp_path / "file")


@pytest.mark.parametrize("size", [100, 100_000])
def test_full_disk(tmp_path, size):
    """First for the configuration, then for the checkpoint; afterwards the same run is as if nothing had been."""
    config = tiny(epochs=1)
    with full_disk(size), pytest.raises(OSError, match=r"cannot write .* \(File too large\); free space") as raised:
        run(config, tmp_path)
    assert ("checkpoint.pt" if size > 1000 else "config.json") in str(raised.value)
    assert not list(tmp_path.glob("*/*.part*")) and not list(tmp_path.glob("*/checkpoint.pt"))
    assert run(config, tmp_path)["loss_per_step"] == run(config, tmp_path / "other")["loss_per_step"]


def test_full_disk_for_an_adapter(tmp_path):
    model = add_lora(build_vit(), 4, 4)
    with full_disk(1000), pytest.raises(OSError, match=r"cannot write .*saved \(.*File too large.*\); free space"):
        save_adapter(model, tmp_path / "saved")


def test_device_auto_is_the_best_there_is():
    expected = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert str(resolve_device("auto")) == expected


# Parts


@pytest.mark.parametrize(
    "text, layers",
    [("all", "all"), ("4", 4), ("blocks.1.mlp.act,blocks.3.mlp.act", ("blocks.1.mlp.act", "blocks.3.mlp.act"))],
)
def test_layers_as_words(text, layers):
    assert make_config(abm_layers=text).init_config().layers == layers


def test_learning_rate_against_the_formula():
    config = make_config(epochs=10, warmup=0.2, lr=1e-3)
    rates = [train.learning_rate(config, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx([1e-4 * (k + 1) for k in range(10)])
    assert rates[10] == pytest.approx(1e-3)
    assert rates[30] == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert rates[49] == pytest.approx(1e-3 * (0.01 + 0.99 * (1 + math.cos(math.pi * 39 / 40)) / 2))
    constant = dataclasses.replace(config, schedule="constant")
    assert [train.learning_rate(constant, step, 5) for step in (9, 10, 49)] == [1e-3] * 3
    assert train.learning_rate(dataclasses.replace(config, warmup=0.0), 0, 5) == pytest.approx(1e-3)


def test_order_is_a_permutation_fixed_by_seed_and_epoch():
    batches = data.shuffled(103, 10, seed=3, epoch=2)
    assert [len(b) for b in batches] == [10] * 10 + [3]
    assert sorted(torch.cat(batches).tolist()) == list(range(103))
    again, next_epoch = data.shuffled(103, 10, 3, 2), data.shuffled(103, 10, 3, 3)
    assert all(map(torch.equal, batches, again)) and not torch.equal(batches[0], next_epoch[0])


def test_preprocessing_is_the_models_own_and_squashes():
    model = timm.create_model("vit_base_patch16_224.orig_in21k", depth=1, num_classes=2)
    pre = data.preprocessing_for(model, 48)
    assert pre.mean == pre.std == (0.5, 0.5, 0.5) and pre.interpolation == "bicubic"
    picture = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    found = pre.resize(picture[None])
    expected = np.asarray(Image.fromarray(picture).resize((48, 48), Image.Resampling.BICUBIC))
    assert found.shape == (1, 3, 48, 48) and found.dtype == torch.uint8
    difference = np.abs(found[0].permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.1  # Pillow and torchvision round at different places
    torch.testing.assert_close(pre.normalise(found), found / 127.5 - 1)


_PRE = data.Preprocessing(8, "bilinear", (0.0,) * 3, (1.0,) * 3)


class BrokenItems:
    """Labels of the images that are asked for alone; the third image cannot be read."""

    def images(self, positions):
        if 2 in positions:
            raise ValueError("list.txt:3: image.jpg cannot be read")
        return [np.zeros((4, 4, 3), np.uint8) for _ in positions]

    def labels(self, positions):
        assert len(positions) <= data.CHUNK
        return np.asarray(positions) % 16


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(workers):
    task = vtab_tasks.get_task("dsprites_loc")
    whole = vtab_tasks.TaskData(task, "test", "folder", None, "", BrokenItems(), np.arange(3, 3 * data.CHUNK))
    assert sum(len(y) for _, y in data.Stream(whole, _PRE, workers)) == 3 * data.CHUNK - 3
    with pytest.raises(ValueError) as raised:
        list(data.Stream(dataclasses.replace(whole, positions=np.arange(5)), _PRE, workers))
    assert str(raised.value) == "list.txt:3: image.jpg cannot be read"


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_is_every_image_in_order(workers):
    test = vtab_tasks.load("dsprites_ori", "test", source="rendered").subset(300, 0)
    pre = data.Preprocessing(64, "nearest", (0.0,) * 3, (1.0,) * 3)
    chunks = list(data.Stream(test, pre, workers))
    assert torch.cat([c[1] for c in chunks]).tolist() == [label for _, label in test]
    expected = np.stack([image for image, _ in test]).transpose(0, 3, 1, 2)
    assert np.array_equal(torch.cat([c[0] for c in chunks]).numpy(), expected)


def test_the_bar_of_a_test_knows_its_end(monkeypatch, capsys):
    monkeypatch.setattr(data, "CHUNK", 4)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)  # somebody watches
    test = vtab_tasks.load("dsprites_ori", "test", source="rendered").subset(10, 0)
    pre = data.Preprocessing(8, "nearest", (0.0,) * 3, (1.0,) * 3)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 16))
    answers.answer(model, data.Stream(test, pre), pre, torch.device("cpu"), "fp32", quiet=False)
    assert "test: 100%" in (shown := capsys.readouterr().err) and "3/3" in shown


def test_batch_norm_keeps_the_statistics_that_the_adapter_was_saved_without():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Dropout(0.5)).eval()
    train.train_mode(model)
    assert [m.training for m in model] == [False, True]
    model(torch.randn(8, 3) + 5)
    assert not model[0].running_mean.any()


def test_plain_attention_only_in_bf16_on_cpu():
    for device, precision, fused in (("cpu", "bf16", False), ("cpu", "fp32", True), ("cuda", "bf16", True)):
        model = build_vit()
        train.choose_attention(model, torch.device(device), precision)
        assert {block.attn.fused_attn for block in model.blocks} == {fused}


# Predict


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i, (image, _) in enumerate(vtab_tasks.load("dsprites_loc", "test", source="rendered")[:3]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    """A run on weights that are there again for predict."""
    folder = tmp_path_factory.mktemp("weights")
    torch.save(build_vit(num_classes=3, img_size=160).state_dict(), folder / "test_vit.pth")
    config = tiny(weights=str(folder / "test_vit.pth"), epochs=1)
    return config, run(config, folder)


@pytest.mark.parametrize("inner", ["", "adapter"])
def test_predict_equals_the_model_by_hand(from_file, pictures, inner):
    config, result = from_file
    rows = predict(f"{result['folder']}/{inner}", pictures)
    backbone, _ = create_backbone(config.model, 16, 32, config.weights)
    model = load_adapter(backbone, f"{result['folder']}/adapter").eval()
    pre = data.Preprocessing(**result["preprocessing"])
    for row, path in zip(rows, pictures, strict=True):
        with torch.no_grad():
            expected = model(pre.normalise(pre.resize(np.array(Image.open(path))[None]))).softmax(-1)[0]
        assert row["image"] == str(path) and row["task"] == "dsprites_loc"
        assert row["label"] == int(expected.argmax())
        assert row["probability"] == pytest.approx(expected.max().item(), rel=1e-5)


def test_predict_wants_the_weights_that_the_run_had(from_file, pictures, tmp_path):
    config, result = from_file
    other = build_vit(num_classes=3, img_size=160).requires_grad_(False)
    other.norm.bias += 1
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"was trained on .*test_vit\.pth \(sha256 .*found was .*other\.pth"):
        predict(result["folder"], pictures, weights=str(tmp_path / "other.pth"))


def test_predict_after_a_run_on_random_weights(tmp_path, pictures):
    """The seed gives them again."""
    result = run(tiny(epochs=1, seed=3), tmp_path / "out")
    torch.manual_seed(3)
    model = load_adapter(create_backbone("test_vit", 16, 32, "none")[0], f"{result['folder']}/adapter").eval()
    pre = data.Preprocessing(**result["preprocessing"])
    pixels = pre.normalise(pre.resize(np.stack([np.array(Image.open(p)) for p in pictures])))
    rows = predict(result["folder"], pictures)
    assert [row["probability"] for row in rows] == pytest.approx(model(pixels).softmax(-1).amax(-1).tolist(), rel=1e-5)


def test_predict_with_a_damaged_adapter(from_file, pictures, tmp_path):
    shutil.copytree(f"{from_file[1]['folder']}/adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        predict(tmp_path / "adapter", pictures)


def test_predict_on_what_is_not_there(from_file, pictures, tmp_path):
    folder = from_file[1]["folder"]
    with pytest.raises(FileNotFoundError, match=r"no image .*absent\.png"):
        predict(folder, [tmp_path / "absent.png"])
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:100])
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        predict(folder, [tmp_path / "broken.png"])
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"bomb\.png cannot be read as an image"):
        predict(folder, [tmp_path / "bomb.png"])
    with pytest.raises(ValueError, match="top is 0; it must be 1 or more"):
        predict(folder, pictures, top=0)
    with pytest.raises(FileNotFoundError, match=r"no abm\.json in .*folder of a finished run"):
        predict(tmp_path, pictures)
    (tmp_path / "abm.json").write_text('{"format": 1, "qv_only": [], "run": {"model": "test_vit"}}')
    with pytest.raises(
        ValueError, match=r"abm\.json: it lacks .*run\.weights, .*; it is damaged, or its model was not described"
    ):
        predict(tmp_path, pictures)
    (tmp_path / "abm.json").write_text('{"format": 1, "qv_only": []}')
    with pytest.raises(ValueError, match="was not written by a run"):
        predict(tmp_path, pictures)


DELETED = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run.model", DELETED),
        ("preprocessing", [1]),
        ("weights", None),
        ("run.model", 3),
        ("run.weights", None),
        ("run.task", ["x"]),
        ("run.seed", 1.5),
        ("run.seed", True),
        ("run.seed", -1),
        ("num_classes", 0),
        ("num_classes", "16"),
        ("weights.sha256", 5),
        ("preprocessing.image_size", 10**12),
        ("preprocessing.interpolation", "best"),
        ("preprocessing.mean", 0.5),
        ("preprocessing.mean", [0, 0, float("nan")]),
        ("preprocessing.std", [1, 1, 0]),
        ("data_source", {}),
    ],
)
def test_predict_wants_a_whole_record_of_the_run(from_file, pictures, tmp_path, field, value):
    shutil.copytree(f"{from_file[1]['folder']}/adapter", tmp_path / "adapter")
    whole = json.loads((tmp_path / "adapter" / "abm.json").read_text())
    *above, last = field.split(".")
    place = whole
    for word in above:
        place = place[word]
    place[last] = value
    if value is DELETED:
        del place[last]
    (tmp_path / "adapter" / "abm.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match=rf"abm\.json: .*{above[0] if above else last}"):
        predict(tmp_path / "adapter", pictures)
