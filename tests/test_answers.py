"""Answers to a split, and their picture: against a plain loop, and in the folders of real runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import vtab_tasks
from abm_vision import vtab
from abm_vision.images import answers, figures
from abm_vision.images.answers import Answers, answer, sample, write_answers
from abm_vision.images.data import Preprocessing
from abm_vision.runs.folder import open_folder
from abm_vision.tune import make_config, run

PRE = Preprocessing(8, "nearest", (0.0,) * 3, (1.0,) * 3)


def test_every_answer_against_a_plain_loop_and_the_images_across_chunks():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (23, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (23,), generator=generator)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
    chunks = list(zip(pixels.split(7), labels.split(7), strict=True))
    few = torch.tensor([0, 6, 7, 20, 22])
    found = answer(model, chunks, PRE, torch.device("cpu"), "fp32", quiet=True, sampled=few)
    with torch.no_grad():
        wanted = [int(model(image[None].float() / 255).argmax()) for image in pixels]
    assert found.predicted.tolist() == wanted and torch.equal(found.labels, labels) and len(found) == 23
    assert found.correct == sum(a == b for a, b in zip(wanted, labels.tolist(), strict=True))
    assert torch.equal(found.pixels, pixels[few])
    assert len(answer(model, chunks, PRE, torch.device("cpu"), "fp32", quiet=True).pixels) == 0


@pytest.mark.parametrize("total", [1, 12, 60, 73728])
def test_a_few_positions_the_same_for_all(total):
    found = sample(total)
    assert torch.equal(found, sample(total)) and len(found) == min(12, total) == len(set(found.tolist()))
    assert found.tolist() == sorted(found.tolist()) and 0 <= found[0] and found[-1] < total


def drawn(monkeypatch, folder, found, classes, of="what"):
    """The figure that is written, as its captions and its pixels."""
    kept = []
    monkeypatch.setattr(answers, "save_figure", lambda figure, path: kept.append((figure, path)))
    write_answers(found, classes, of, folder)
    ((figure, path),) = kept
    assert path == folder / "answers.png"
    (axes,) = figure.axes
    return [text.get_text() for text in axes.texts], np.asarray(axes.images[0].get_array())


def test_the_picture_says_what_is_right(monkeypatch, tmp_path):
    pixels = torch.stack([torch.full((3, 10, 10), shade, dtype=torch.uint8) for shade in (50, 100, 150)])
    found = Answers(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 2, 2, 0]), torch.tensor([0, 1, 2]), pixels)
    names = ("a class of a very long name", "$b$", "c")
    texts, canvas = drawn(monkeypatch, tmp_path, found, names, of="a task " * 30)
    assert "3 images drawn at random, 2 right" in texts[0] and max(map(len, texts[0].split("\n"))) < 70
    assert texts[1:] == ["✓ a class of a ver…", r"✗ \$b\$" + "\nis c", "✓ c"]
    shades = [(canvas == shade).all(2).sum() for shade in (50, 100, 150)]
    assert len(set(shades)) == 1 and shades[0] == (figures.CELL - 2 * figures.GAP) ** 2
    frames = [(canvas == np.array(colour)).all(2).sum() for colour in figures.FRAMES]
    assert frames[1] == 2 * frames[0] > 0


def test_pictures_of_any_shape_fit_their_cells():
    shapes = [(300, 100, 3), (1, 400, 3), (5, 5, 3)]
    canvas = figures.draw_sheet([np.full(shape, 9, np.uint8) for shape in shapes], ["a", "b", "c"]).axes[0].images[0]
    inside = (np.asarray(canvas.get_array()) == 9).all(2)
    side = figures.CELL - 2 * figures.GAP
    sizes = [inside[:, k * figures.CELL : (k + 1) * figures.CELL].sum() for k in range(3)]
    assert sizes == [side * round(side / 3), side, side * side]


def test_vtab_shows_images_of_the_test_split_as_the_model_gets_them(vit_run, monkeypatch, tmp_path):
    """Those of a run, drawn again here from its data and what it answers now."""
    config, out, result = vit_run
    assert Image.open(out / config.run_name() / "answers.png").width == 1020
    kept = []
    monkeypatch.setattr("abm_vision.vtab.harness.write_answers", lambda *given: kept.append(given))
    again = vtab.run(config, tmp_path)
    ((found, classes, of, folder),) = kept
    assert folder == Path(again["folder"]) and of.startswith("dsprites_loc [rendered], test images; classes: ")
    assert classes == [*map(str, range(16))] and len(found) == 60 and found.correct == again["test"]["correct"]
    test = vtab_tasks.load("dsprites_loc", "test", source="rendered").subset(60, 0)
    wanted = [Image.fromarray(test[k][0]).resize((32, 32), Image.Resampling.BICUBIC) for k in found.sampled]
    shown = found.pixels.permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(shown - np.stack(wanted).astype(int)).max() <= 3
    assert found.labels.tolist() == test.labels.tolist()


@pytest.mark.parametrize("part", ["test", "validation"])
def test_ones_own_images(part, monkeypatch, tmp_path):
    for split, count in {"train": 6, "val": 4, "test": 5}.items():
        for k, name in enumerate(("red", "blue")) if split != "test" or part == "test" else ():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                colour = (0, 10 * i, 255) if k else (255, 10 * i, 0)
                Image.new("RGB", (20, 20), colour).save(tmp_path / "data" / split / name / f"{i}.png")
    kept = []
    monkeypatch.setattr("abm_vision.tune.harness.write_answers", lambda *given: kept.append(given))
    own = {name: value for name, value in TINY.items() if name != "test_images"}
    result = run(make_config(**own, data=str(tmp_path / "data"), init="kaiming"), tmp_path / "out")
    ((found, classes, of, folder),) = kept
    count = {"test": 10, "validation": 8}[part]
    assert of == f"{tmp_path / 'data'}, {part} images" and folder == Path(result["folder"])
    assert len(found) == count == len(found.pixels) and found.correct == result[part]["correct"]
    blue = found.pixels[:, 2].float().mean((1, 2)) > 128
    assert [classes[label] for label in found.labels[found.sampled]] == ["blue" if b else "red" for b in blue]


def test_a_run_made_anew_removes_the_picture_first(tmp_path, monkeypatch):
    """It is of the run that was."""
    config = vtab.make_config(**TINY, init="kaiming")
    picture = open_folder(tmp_path, config) / "answers.png"
    picture.write_text("old")
    monkeypatch.setattr("abm_vision.vtab.harness.train_epochs", lambda *_: (_ for _ in ()).throw(ValueError("stop")))
    with pytest.raises(ValueError, match="stop"):
        vtab.run(config, tmp_path)
    assert not picture.exists()
