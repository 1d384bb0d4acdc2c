"""A tuned model as one file: it computes what the adapted model does, without this package and without peft."""

import json
import shutil
import socket

import numpy as np
import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from helpers import answer, same
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from abm_vision import add_lora, create_backbone, save_adapter
from abm_vision.export import write
from abm_vision.export.write import export

NAMES = ["ant", "bee", "cat"]
SHAPE = {"image_size": 32, "interpolation": "bicubic", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of an adapter whose base weights are a file, and the model that was saved."""
    place = tmp_path_factory.mktemp("export")
    torch.save(build_vit(num_classes=3, img_size=160).state_dict(), place / "base.pth")
    torch.manual_seed(1)
    model = randomise(add_lora(create_backbone("test_vit", 3, 32, str(place / "base.pth"))[0], 2, qkv="qv")).eval()
    save_adapter(model, place / "adapter", classes=NAMES, preprocessing=SHAPE)
    return place / "adapter", model


def test_a_checkpoint_for_timm_is_loaded_by_timm_alone(saved, tmp_path):
    found = export(saved[0], "timm", tmp_path / "new" / "model.safetensors")
    plain = timm.create_model("test_vit", num_classes=3, img_size=32, checkpoint_path=str(found.path)).eval()
    torch.testing.assert_close(plain(images()), saved[1](images()), rtol=1e-4, atol=1e-4)
    assert 0 < found.difference < 1e-3 and f"{found.difference:.2g}" in str(found)
    with safe_open(found.path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == NAMES
    assert [path.name for path in found.path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.slow
def test_a_program_of_torch_takes_pixels_and_any_batch(saved, tmp_path):
    found = export(saved[0], "torch", tmp_path / "model.pt2", normalise=True)
    about = {"abm.json": ""}
    program = torch.export.load(found.path, extra_files=about).module()
    pixels = torch.randint(256, (7, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(SHAPE[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(program(pixels), saved[1]((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-4)
    assert json.loads(about["abm.json"])["preprocessing"]["mean"] == SHAPE["mean"]


@pytest.fixture(scope="module")
def onnx_file(saved, tmp_path_factory):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return export(saved[0], "onnx", tmp_path_factory.mktemp("onnx") / "model.onnx", normalise=True)


@pytest.mark.slow
def test_an_onnx_file_takes_pixels_and_any_batch(saved, onnx_file):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_file.path)
    mean, std = (torch.tensor(SHAPE[name])[:, None, None] for name in ("mean", "std"))
    for count in (1, 4):
        pixels = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
        (found,) = session.run(["logits"], {"images": pixels.numpy()})
        np.testing.assert_allclose(found, saved[1]((pixels / 255 - mean) / std).detach(), rtol=1e-3, atol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == NAMES


@pytest.mark.checkout
@pytest.mark.slow
def test_the_page_on_serving_runs(saved, onnx_file, tmp_path, monkeypatch, capsys):
    import re
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text()
    (block,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "onnxruntime" in code)
    monkeypatch.chdir(tmp_path)
    shutil.copy(onnx_file.path, "model.onnx")
    Image.effect_noise((48, 40), 80).convert("RGB").save("photo.jpg")
    exec(block, {})
    assert re.fullmatch(r"(ant|bee|cat) 0\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize("program", ["vtab", "tune"])
def test_the_commands(saved, tmp_path, capsys, program):
    from importlib import import_module

    main = import_module(f"abm_vision.{program}.__main__").main
    code, out, _ = answer(["merge", saved[0], "--out", tmp_path / "a.safetensors"], capsys, main)
    assert code == 0 and "largest difference" in out
    code, out, _ = answer(["export", saved[0], "--to", "timm", "--out", tmp_path / "b.safetensors"], capsys, main)
    assert code == 0 and same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"))


REFUSED = {
    "another ending": (["--to", "onnx", "--out", "model.pt"], r"for onnx its name must end in \.onnx"),
    "weights normalise nothing": (
        ["--to", "timm", "--normalise", "--out", "a.safetensors"],
        "cannot normalise: take --to onnx or torch",
    ),
    "no such kind": (["--to", "tflite", "--out", "a.tflite"], "invalid choice: 'tflite'"),
    "other weights": (["--to", "timm", "--out", "a.safetensors", "--weights", "none"], "pass the same weights"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_export(saved, tmp_path, capsys, monkeypatch, kind):
    import re

    from abm_vision.vtab.__main__ import main

    monkeypatch.chdir(tmp_path)
    words, message = REFUSED[kind]
    code, _, err = answer(["export", saved[0], *words], capsys, main)
    assert code == 2 and re.search(message, err) and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_message(saved, tmp_path, capsys, monkeypatch):
    from abm_vision.vtab.__main__ import main

    monkeypatch.setattr(write, "NEEDED", ("onnx", "not_there_at_all"))
    code, _, err = answer(["export", saved[0], "--to", "onnx", "--out", tmp_path / "a.onnx"], capsys, main)
    assert code == 2 and 'ONNX needs not_there_at_all: pip install -e ".[export]"' in err


def test_a_model_too_large_for_one_onnx_file_is_refused(saved, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(write, "LIMIT", 1000)
    with pytest.raises(ValueError, match="an ONNX file holds 2: export it to torch"):
        export(saved[0], "onnx", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_not_left(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_WRITERS", {"timm": lambda model, batch, path, facts: lambda x: model(x) + 1})
    with pytest.raises(ValueError, match=r"was not written: it would differ by 1(\.0\d*)? from torch"):
        export(saved[0], "timm", tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


# ---- a page in the browser -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_port_that_is_taken_is_one_message(saved, capsys):
    pytest.importorskip("gradio")
    from abm_vision.tune.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = answer(["demo", saved[0], "--port", port], capsys, main)
    assert code == 2 and f"nothing can be served at port {port} of 127.0.0.1: another program has it" in err


@pytest.mark.slow
def test_the_page_answers_as_predict_does(saved, browser, tmp_path):
    """One with its EXIF on its side, one that is no single picture, as a visitor sees them."""
    pytest.importorskip("gradio")
    from abm_vision.images.classifier import load_classifier
    from abm_vision.images.demo import page
    from abm_vision.images.predict import predict

    good, bad = tmp_path / "photo.jpg", tmp_path / "moving.gif"
    turned = Image.Exif()
    turned[0x0112] = 6  # a quarter turn
    noise = Image.effect_noise((60, 40), 90).convert("RGB")
    noise.save(good, exif=turned)
    noise.save(bad, save_all=True, append_images=[noise.rotate(90)])
    (row,) = predict(saved[0], [good], top=3)
    _, address, _ = (served := page(load_classifier(saved[0]))).launch(prevent_thread_lock=True, quiet=True)
    seen = browser.new_page()
    try:
        seen.goto(address)
        seen.locator("input[type=file]").set_input_files(good)
        seen.get_by_role("button", name="Submit").click()
        label = seen.locator("[data-testid=label-output-value]")
        label.wait_for()
        assert label.inner_text() == row["class"]
        texts = seen.locator("[data-testid$=-confidence-set]").all_inner_texts()
        assert [text.split()[0] for text in texts] == [one["class"] for one in row["top"]]
        seen.get_by_role("button", name="Clear").click()
        seen.locator("input[type=file]").set_input_files(bad)
        seen.get_by_role("button", name="Submit").click()
        seen.get_by_text("it has 2 frames").wait_for()
    finally:
        seen.close()
        served.close()


def test_the_page_without_its_package_is_one_message(saved, capsys, monkeypatch):
    import sys

    from abm_vision.tune.__main__ import main

    monkeypatch.setitem(sys.modules, "gradio", None)
    code, _, err = answer(["demo", saved[0]], capsys, main)
    assert code == 2 and 'the page needs gradio: pip install -e ".[demo]"' in err
