"""Models small enough for every test: timm's own `test_vit` and its relatives, with random weights."""

import gc
import os
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

# Set before any Hugging Face library is imported: nothing here may reach for a network.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# One thread in every process, those that tests start as well: pytest-xdist has a process on every core.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import timm
import torch
from hypothesis import settings
from matplotlib.figure import Figure

from abm_vision.abm.merged_linear import BlockLinear

SIDE = 32  # pixels
TINY = {  # settings of a run that takes seconds
    "model": "test_vit",
    "weights": "none",
    "image_size": SIDE,
    "rank": 4,
    "epochs": 2,
    "batch_size": 250,
    "test_images": 60,
    "precision": "fp32",
    "device": "cpu",
    "abm_steps": 2,
    "abm_samples": 16,
}

# Beside an installed package, `tests` alone runs all but what reads the rest of the repository.
CHECKOUT = Path(__file__).parent.parent
IS_CHECKOUT = (CHECKOUT / "mkdocs.yml").exists()
NEED_CHECKOUT = (
    *("docs", "docstrings", "examples", "families", "imports", "messages", "notebook_switches", "notebooks"),
    *("package", "plugin", "readme", "states"),
)
collect_ignore = [] if IS_CHECKOUT else [f"test_{name}.py" for name in NEED_CHECKOUT]

pytest.register_assert_rewrite("helpers")
torch.set_num_threads(1)
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")


def pytest_collection_finish():
    """Spare every later collection of garbage what has been imported."""
    gc.collect()
    gc.freeze()


def build_vit(name="test_vit", num_classes=5, **options):
    """A tiny ViT whose every weight is random: timm starts many at zero, which would hide mistakes."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes, **{"img_size": SIDE, **options})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.startswith("head"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def randomise(model, scale=0.3, adapter="default"):
    """Give every B of an adapter a value, so that the adapter does something."""
    generator = torch.Generator("cpu").manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{adapter}" in name:
                drawn = torch.randn(parameter.shape, generator=generator, device="cpu")
                parameter.copy_(scale * drawn / parameter.shape[1] ** 0.5)
        for module in model.modules():
            if isinstance(module, BlockLinear):
                module.weight.mul_(module.mask)
    return model


def pytest_runtest_setup(item):
    if item.get_closest_marker("checkout") and not IS_CHECKOUT:
        pytest.skip("needs the repository")


@contextmanager
def full_disk(size):
    """A disk on which no file can grow beyond `size` bytes, for this process and those that it starts."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def images(count=4, side=SIDE, seed=0):
    """The same on every device."""
    made = torch.randn(count, 3, side, side, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    return made.to(torch.get_default_device())


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    """Where models and tensors are made; a module's tests run on the CPU and, where there is one, on a GPU."""
    if request.param == "cpu":
        yield request.param
        return
    torch.set_default_device(request.param)
    yield request.param
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def empty_figures(request, monkeypatch):
    """Half a second a figure: they are drawn in the runs that tests share, and where a test is marked `figures`."""
    if "figures" not in request.keywords:
        draw = Figure.savefig
        monkeypatch.setattr(Figure, "savefig", lambda _, path, **options: draw(Figure((1, 1)), path))


@pytest.fixture
def vit():
    return build_vit().eval()


@pytest.fixture(scope="session")
def t5(tmp_path_factory):
    """A folder with a T5 of random weights and ByT5's tokeniser."""
    from transformers import ByT5Tokenizer, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=384, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """A folder with a LLaMA of random weights and ByT5's tokeniser."""
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_run(tmp_path_factory):
    """A finished run on images, to be read alone: configuration, results folder, what it returned."""
    from abm_vision.vtab import make_config, run

    config, out = make_config(**TINY, eval_epochs=1), tmp_path_factory.mktemp("vit_run")
    return config, out, run(config, out)


@pytest.fixture(scope="session")
def glue_run(t5, tmp_path_factory):
    """A finished run on GLUE, to be read alone: what it returned, its lines, results folder."""
    from helpers import small_glue

    from nlp_ext.glue import run

    out, lines = tmp_path_factory.mktemp("glue_run"), []
    return run(small_glue(t5), out, diagnose=True, extras=("server",), say=lines.append), lines, out


@pytest.fixture(scope="module")
def browser():
    """Chromium, of a test that looks at a page."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
