"""What depends on a GPU, asked without one."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from abm_vision.abm.restore import seeded
from abm_vision.images import data
from abm_vision.images.data import Images, Preprocessing
from abm_vision.images.train import classify
from abm_vision.initializers.peft_own import _repeatable_attention
from abm_vision.runs.device import choose_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda:1")
PRE = Preprocessing(8, "nearest", (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_precision_is_that_of_the_device_asked_for(capability, precision, monkeypatch):
    others = {CUDA: capability}  # another device is a KeyError
    monkeypatch.setattr(torch.cuda, "get_device_capability", others.__getitem__)
    assert choose_precision("auto", CUDA) == precision


def test_seeding_asks_for_the_state_of_every_gpu(monkeypatch):
    """Without their names torch warns where there are several."""
    asked, given_back = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: asked.append(device) or device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: given_back.append((state, device)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with seeded(3):
            assert asked == [0, 1] and not given_back
    assert given_back == [(0, 0), (1, 1)]


def test_gradients_of_an_initialisation_repeat_on_cuda():
    def fused():
        return [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()]

    before = fused()
    with _repeatable_attention(CPU):
        assert fused() == before
    with _repeatable_attention(CUDA):
        assert fused() == [False, False] and torch.backends.cuda.math_sdp_enabled()
    assert fused() == before


def test_images_that_a_gpu_has_no_room_for_stay_in_host_memory(monkeypatch):
    pixels, labels = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8), torch.arange(10)
    memory = SimpleNamespace(total_memory=4 * pixels.nbytes)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    assert data._has_room(CUDA, pixels.nbytes) and not data._has_room(CUDA, pixels.nbytes + 1)
    assert data._has_room(CPU, 1 << 60)
    expected = list(Images(pixels, labels, PRE, CPU).batches(4, seed=0, epoch=0))
    monkeypatch.setattr(data, "_has_room", lambda device, size: False)
    elsewhere = Images(pixels, labels, PRE, torch.device("meta"))  # any device but the host's
    assert elsewhere.pixels.device == elsewhere.labels.device == CPU
    for (x, y), (image, label) in zip(elsewhere.batches(4, seed=0, epoch=0), expected, strict=True):
        assert x.is_meta and y.is_meta and x.shape == image.shape and y.shape == label.shape


def test_large_images_are_classified_a_few_together():
    """Training at 518 px on a few images must not be followed by 256 of them at once."""
    counts = []

    def model(x):
        counts.append(len(x))
        return x.mean((2, 3))

    model.eval = lambda: None
    pixels = torch.randint(0, 256, (30, 3, 518, 518), dtype=torch.uint8)
    ((logits, _),) = classify(model, [(pixels, torch.arange(30))], PRE, CPU, "fp32")
    assert counts == [11, 11, 8]  # 64 images of 224 px are 11.97 of 518 px
    torch.testing.assert_close(logits, pixels.float().mean((2, 3)) / 255)
    counts.clear()
    list(classify(model, [(pixels[..., :112, :112].repeat(8, 1, 1, 1), torch.arange(240))], PRE, CPU, "fp32"))
    assert counts == [240]
