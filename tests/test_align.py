"""The aligned start: directions against numpy's decomposition of autograd's gradients, size against the match rate."""

import copy

import numpy as np
import pytest
import torch
from conftest import images
from helpers import gradients_by_autograd, record, small_vit

from abm_vision import AlignConfig, add_lora, information_loss, initialize_lora_aligned_weights
from abm_vision.abm import reference
from abm_vision.abm.adapter import adapted_layers
from abm_vision.vit import VIT


@pytest.fixture(scope="module", autouse=True)
def batch(device):
    global X, Y
    X, Y = images(16), torch.arange(16) % 5


def aligned(config=None, batches=None, base=None, **options):
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(base) if base else small_vit(), **{"rank": 3, **options})
    report = initialize_lora_aligned_weights(model, [(X, Y)] if batches is None else batches, config)
    return model, report


def span(rows):
    """Projection on the row space."""
    return np.linalg.pinv(rows) @ rows


def test_factors_are_singular_vectors_of_the_gradient():
    fresh = add_lora(small_vit(), rank=3).eval()
    gradients = gradients_by_autograd(fresh, X, Y)
    model, report = aligned(AlignConfig(norm=0.7, size=0.002))
    for name, layer in adapted_layers(model, "default").items():
        u, _, vh = np.linalg.svd(gradients[name].double().cpu().numpy())
        a, b = (getattr(layer, f)["default"].weight.detach().double().cpu().numpy() for f in ("lora_A", "lora_B"))
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), 0.7, rtol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(b, axis=0), report.size, rtol=1e-4)
        np.testing.assert_allclose(span(b.T), span(u[:, :3].T), atol=2e-2)
        np.testing.assert_allclose(span(a), span(vh[3:6]), atol=2e-2)
    # So the information loss on these samples is the optimum, up to what B moves and the decomposition's accuracy.
    found = information_loss(model, [(X, Y)], VIT.loss_fn).overall
    assert found.loss == pytest.approx(found.optimum, abs=2e-3) and found.loss < 0.1 < found.random


def test_batches_are_averaged():
    one, _ = aligned(batches=[(X, Y)])
    parts, report = aligned(batches=[(X[:4], Y[:4]), (X[4:], Y[4:])])
    assert report.samples == 16
    for first, second in zip(*(adapted_layers(m, "default").values() for m in (one, parts)), strict=True):
        rows = [m.lora_A["default"].weight.detach().double().cpu().numpy() for m in (first, second)]
        np.testing.assert_allclose(span(rows[0]), span(rows[1]), atol=2e-2)


def match_rate(model, base):
    names = ["blocks.0.mlp.act", "blocks.1.mlp.act"]
    z, reference = record(model.eval(), X, names), record(base, X, names)
    return np.mean([((z[n] > 0) == (reference[n] > 0)).float().mean().item() for n in names])


@pytest.mark.parametrize("match, size", [(0.9, 4.0), (0.995, 4.0), (0.5, 0.01)])
def test_boundaries_keep_their_side(match, size):
    base = small_vit()
    model, report = aligned(AlignConfig(size=size, match=match), base=base)
    rate = match_rate(model, base)
    assert report.after.match == pytest.approx(rate, abs=1e-5) and rate >= match and report.before.match == 1
    halvings = round(np.log2(size / report.size))
    assert report.size == size / 2**halvings
    if halvings:  # and the size before was too large
        bigger, twice = aligned(AlignConfig(size=2 * report.size, match=1e-9), base=base)
        assert twice.after.match < match and match_rate(bigger, base) < match
    else:
        assert size == 0.01


def test_q_and_v_have_pairs_of_their_own():
    fresh = add_lora(small_vit(), rank=3).eval()
    gradients = gradients_by_autograd(fresh, X, Y)
    model, _ = aligned(AlignConfig(size=1e-4), qkv="qv")
    for name, layer in adapted_layers(model, "default").items():
        if name.endswith("qkv"):
            a, b = (getattr(layer, f)["default"].weight.detach().double().cpu().numpy() for f in ("lora_A", "lora_B"))
            for rows, k in ((slice(0, 32), slice(0, 3)), (slice(64, 96), slice(3, 6))):
                u, _, vh = np.linalg.svd(gradients[name][rows].double().cpu().numpy())
                np.testing.assert_allclose(span(a[k]), span(vh[3:6]), atol=2e-2)
                np.testing.assert_allclose(span(b[rows, k].T), span(u[:, :3].T), atol=2e-2)
            assert not b[32:64].any()
    found = information_loss(model, [(X, Y)], VIT.loss_fn).overall
    assert found.loss == pytest.approx(found.optimum, abs=2e-3)


def test_rank_beyond_half_of_the_directions():
    model, _ = aligned(rank=30)
    for layer in adapted_layers(model, "default").values():
        assert np.linalg.matrix_rank(layer.lora_A["default"].weight.detach().cpu().numpy()) == 30


def test_report():
    _, report = aligned()
    assert str(report.to_dict()["config"]) and report.to_dict()["layers"][0]["name"] == "blocks.0.mlp.act"
    assert report.seconds > 0 and "match rate" in report.summary() and report.reference == "pretrained"


def test_everything_is_given_back_and_an_error_leaves_the_adapter():
    model = add_lora(small_vit(), rank=3).train()
    flags = [p.requires_grad for p in model.parameters()]
    initialize_lora_aligned_weights(model, [(X, Y)])
    assert model.training and flags == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    model = add_lora(small_vit(), rank=3).train()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="holds no labels"):
        initialize_lora_aligned_weights(model, [X])
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("samples", 0, "1 or more"),
        ("norm", 0, "a finite number above 0"),
        ("size", -1, "a finite number above 0"),
        ("match", 2, r"in \(0, 1\]"),
    ],
)
def test_settings_out_of_range(field, value, words):
    with pytest.raises(ValueError, match=rf"{field} is {value}; .*{words}"):
        AlignConfig(**{field: value})
    AlignConfig(match=1)


def test_refused():
    with pytest.raises(ValueError, match="the aligned initialisation is made for W0 .*dora=False"):
        aligned(dora=True)
    with pytest.raises(ValueError, match="gradient at .* is zero.*draw it at random first"):
        aligned(base=with_zero_head())


def with_zero_head():
    base = small_vit()
    torch.nn.init.zeros_(base.head.weight)
    return base


def test_a_rate_that_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(reference.Calibration, "measure", lambda *a: torch.tensor([[0.0, 0.98, 0.0]]))
    with pytest.raises(ValueError, match=r"stays at 0\.980000, below 0\.99, however small B is"):
        aligned()
