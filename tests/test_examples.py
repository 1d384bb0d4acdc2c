"""The example scripts, and what they promise: adapters that peft loads, processes that start alike."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from abm_vision import ABMConfig, add_lora, information_loss, initialize_lora_abm_weights
from abm_vision.vit import VIT

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ("vit_tiny_patch16_224", 32, "none")
SCRIPTS = sorted({path.stem for path in EXAMPLES.glob("*.py")} - {"made_up", "ddp", "own_images", "noise", "trl_sft"})


def tiny(**options):
    torch.manual_seed(0)
    return timm.create_model(TINY[0], num_classes=4, img_size=TINY[1], **options)


RARE = ("lightning_module", "plain_loop", "timm_training", "transformers_trainer")


@pytest.mark.parametrize("script", [pytest.param(s, marks=[pytest.mark.slow] * (s in RARE)) for s in SCRIPTS])
def test_example(script, monkeypatch, tmp_path):
    if script == "lightning_module":
        pytest.importorskip("lightning")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loss = importlib.import_module(script).main(*TINY, out=str(tmp_path / "adapter"))
    assert math.isfinite(loss)
    base = tiny()
    if script == "transformers_trainer":
        base = TimmWrapperForImageClassification(
            TimmWrapperConfig(architecture=TINY[0], num_labels=4, model_args={"img_size": TINY[1]})
        )
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    b = [p for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(b) == 48 and all(p.abs().max() > 0 for p in b)


@pytest.mark.slow
def test_own_images(monkeypatch, tmp_path, capsys):
    """Two classes that differ in colour, two images in each split and class."""
    for split in ("train", "test"):
        for name, colour in {"blue": (0, 0, 200), "red": (200, 0, 0)}.items():
            (tmp_path / split / name).mkdir(parents=True)
            for k in range(2):
                Image.new("RGB", (40, 40), colour).save(tmp_path / split / name / f"{k}.png")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    out = tmp_path / "adapter"
    top1 = importlib.import_module("own_images").main(str(tmp_path), *TINY, out=str(out), epochs=8)
    assert top1 == 1.0
    assert f"{tmp_path / 'test' / 'blue' / '0.png'}: blue" in capsys.readouterr().out
    assert json.loads((out / "abm.json").read_text())["classes"] == ["blue", "red"]


@pytest.mark.slow
def test_ddp_example(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "ddp"]
    program = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import ddp; ddp.main(*{TINY!r}, out=sys.argv[1])"
    (tmp_path / "two.py").write_text(program)
    words[-2:] = [str(tmp_path / "two.py"), str(tmp_path / "adapter")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")


TWO = """
import json, sys
import torch, torch.distributed as dist, torch.nn.functional as F
sys.path.insert(0, sys.argv[2])
from test_examples import batch, loss_of, started, tiny_lora
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
model = started() if rank == 0 else tiny_lora()
parallel = DistributedDataParallel(model)
x, y = batch()
loss_of(parallel, x[rank::2], y[rank::2]).backward()
gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
torch.save([dict(model.named_parameters()), gradients], f"{sys.argv[1]}/{rank}.pt")
"""


def tiny_lora():
    return add_lora(tiny().double(), rank=2, alpha=2).double()


def started():
    model = tiny_lora()
    initialize_lora_abm_weights(model, [batch()[0]], ABMConfig(steps=3, samples=8), show_progress_bar=False)
    return model


def batch():
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(8, 3, TINY[1], TINY[1], generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (8,), generator=generator)


def loss_of(model, images, labels):
    return F.cross_entropy(model(images), labels)


@pytest.mark.slow
def test_ddp_hands_the_start_round_and_averages_gradients(tmp_path):
    """Two gloo processes, half a batch each, the start in one of them, against one process and the whole batch."""
    (tmp_path / "two.py").write_text(TWO)
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words += [str(tmp_path / "two.py"), str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    model = started()
    loss_of(model.train(), *batch()).backward()
    for rank in (0, 1):
        parameters, gradients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameters[name], parameter, atol=1e-9, rtol=1e-6)
            if parameter.requires_grad:
                torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-9, rtol=1e-6)


def test_transformers_wrapper_is_the_timm_model_inside():
    """Boundaries, loss and head of `TimmWrapperForImageClassification` against those of the bare model."""
    wrapper = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=TINY[0], num_labels=4, model_args={"img_size": TINY[1]})
    )
    bare = tiny()
    wrapper.timm_model.load_state_dict(bare.state_dict())
    images, labels = batch()
    images = images.float()
    reports, lost = [], []
    for model, data in ((wrapper, {"pixel_values": images, "labels": labels}), (bare, (images, labels))):
        torch.manual_seed(1)
        adapted = add_lora(model, rank=2, alpha=2)
        lost.append(information_loss(adapted, [data], VIT.loss_fn).overall.loss)
        reports.append(
            initialize_lora_abm_weights(adapted, [data], ABMConfig(steps=2, samples=8), show_progress_bar=False)
        )
        assert [n for n, p in adapted.named_parameters() if p.requires_grad and "head" in n]
    assert reports[0].after == reports[1].after and lost[0] == lost[1]
    assert json.dumps(reports[0].to_dict())
