"""Every documented switch of the notebooks in its other position: tiny models and sizes, the same cells.

`tests/test_notebooks.py` runs them as they are stored.
"""

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import pytest
import timm
import torch
from conftest import TINY
from matplotlib import pyplot
from PIL import Image

import abm_vision
from abm_vision.vtab import __main__ as vtab
from nlp_ext import tiny

FOLDER = Path(__file__).parent.parent / "notebooks"
LARGE = ("SMALL = True", "SMALL = False")
SUITE = {key: value for key, value in TINY.items() if key != "epochs"}

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder and settings of its own, and no figure left."""
    monkeypatch.chdir(tmp_path)
    with matplotlib.rc_context():
        yield
    pyplot.close("all")


@pytest.fixture(autouse=True)
def small_models(monkeypatch, tmp_path):
    """A ViT, a T5 and a LLaMA of random weights where the notebooks take pretrained ones."""

    def vit(model, num_classes, img_size, *_, **__):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            patch = 16 if img_size % 16 == 0 else 14
            made = timm.create_model("test_vit", num_classes=num_classes, img_size=img_size, patch_size=patch)
        return made, "random"

    def build(folder, weights=None):
        facts = json.loads((Path(folder) / "abm.json").read_text())
        return vit(None, facts["num_classes"], facts["preprocessing"]["image_size"])[0]

    def text(name, **_):
        folder = tmp_path / name
        tiny.make_model(name).save_pretrained(folder)
        tiny.ByT5Tokenizer().save_pretrained(folder)
        return folder

    monkeypatch.setattr(abm_vision, "create_backbone", vit)
    monkeypatch.setattr("abm_vision.images.description.build", build)  # of random weights, which no file holds
    monkeypatch.setattr("abm_vision.export.write.build", build)
    monkeypatch.setattr(tiny, "tiny_folder", text)


def run(name, *changes):
    """Run a notebook's cells with changes to their text, each of which must be there. Returns its variables."""
    from IPython.core.inputtransformer2 import TransformerManager

    (path,) = FOLDER.glob(f"{name}*.ipynb")
    cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    given = {"__name__": "__main__"}

    def system(command):
        words = shlex.split(command.format(**given))
        assert words[1:3] == ["-m", "abm_vision.vtab"]
        flags = [word for key, value in SUITE.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        assert vtab.main([words[3], *flags, *words[4:]]) == 0

    given["get_ipython"] = lambda: SimpleNamespace(system=system)
    text = "\n".join(TransformerManager().transform_cell(cell) for cell in cells)
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    exec(compile(text, str(path), "exec"), given)
    return given


def test_quick_start():
    run("01", LARGE, ("(1000, 12, 2000)", "(24, 2, 12)"))
    titles = [axes.get_title() for number in pyplot.get_fignums() for axes in pyplot.figure(number).axes]
    assert "dSprites location (rendered): one seed, 2 epochs, 12 test images" in titles


def test_activation_boundaries():
    blocks = [("subplots(3, 4,", "subplots(2, 3,"), ("range(12)", "range(6)"), ("range(1, 13)", "range(1, 7)")]
    given = run("02", LARGE, ("else 600", "else 3"), ("else 256", "else 4"), ("1500", "5"), *blocks)
    assert given["count"] == 4


def test_your_own_images_larger():
    run("03", LARGE, ("(112, 12, 150)", "(112, 1, 4)"))


@pytest.mark.parametrize("classes", [2, 5])
def test_your_own_images_from_a_folder(classes, tmp_path):
    """Of another number of classes than the notebook's own, and fewer images than it shows."""
    for split, count in (("train", 3), ("test", 1)):
        for k in range(classes):
            folder = tmp_path / "mine" / split / f"class {k}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (80, 90), (40 * k, 50 * i, 0)).save(folder / f"{i}.jpg")
    given = run("03", ("MINE = None", f"MINE = {str(tmp_path / 'mine')!r}"), ("(70, 4, 40)", "(64, 1, 40)"))
    assert given["CLASSES"] == [f"class {k}" for k in range(classes)] and not (given["OUT"] / "images").exists()


def test_vtab_1k(monkeypatch):
    from abm_vision.vtab import make_config

    monkeypatch.setattr("abm_vision.vtab.make_config", lambda **settings: make_config(**{**SUITE, **settings}))
    tasks = ('else "structured"', 'else "dsprites_loc,dsprites_ori"')
    given = run("04", LARGE, tasks, ("--epochs 12", "--epochs 1"), ('"epochs": 12', '"epochs": 1'))
    assert given["report"].sections[0].methods == ("kaiming", "abm") and len(given["report"].runs) == 8


def test_choosing_an_initialisation():
    given = run(
        "05", LARGE, ("(1000, 8, 3)", "(32, 1, 1)"), ("batches(32, ", "batches(16, "), ("subset(64", "subset(8")
    )
    lines = given["left"].get_lines()
    assert [line.get_label() for line in lines] == given["STARTS"] and len(given["STARTS"]) == 11
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 11
    palette = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, no yellow
    assert {line.get_color() for line in lines} <= {*palette, "#8C8C8C"}  # grey is the default


def test_t5_on_glue(t5):
    model = 'tiny_folder("tiny-t5", show_progress_bar=False)', f'"{t5}"'
    given = run("06", LARGE, model, ("(2000, 5)", "(64, 1)"), ("[:200]", "[:6]"))
    assert len(given["train"]) == 64 and set(given["said"]) == {"ABM", "peft's default"}


def test_llama_on_instructions(llama):
    sizes = ("held_out=50, samples=4, new_tokens=40", "held_out=4, samples=1, new_tokens=4")
    model = ('"smollm2-135m"', f'"{llama}"'), ("fetch(MODEL)", "None")
    given = run("07", LARGE, *model, ("else 1]", "else 150]"), sizes)
    assert 20 < len(given["rows"]) < 50 and given["config"].train_examples == 0
