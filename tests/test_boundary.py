"""The boundary loss against a plain loop in double precision."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abm_vision.abm.boundary import (
    Boundary,
    Signs,
    boundary_figures,
    boundary_loss,
    layer_weight,
    pack_signs,
    signed,
    unpack_signs,
)

pytestmark = pytest.mark.usefixtures("device")


def case(seed, shape=(3, 4, 5)):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    z = torch.randn(shape, generator=generator)
    reference = z + 0.5 * torch.randn(shape, generator=generator)
    mask = torch.rand(shape[:2], generator=generator) < 0.7
    mask[0, 0] = True
    return z, reference, mask


def loss_of(z, sign, margin, mask=None):
    """The loss of a single boundary with w_l^2 = 1."""
    return boundary_loss([Boundary("act", "blocks", 1.0, margin)], {"act": z}, {"act": sign}, {"blocks": mask})


def figures_of(z, sign, margin, mask=None):
    """Its loss, match rate and share inside the margin."""
    (figures,) = boundary_figures([Boundary("act", "blocks", 1.0, margin)], {"act": z}, {"act": sign}, {"blocks": mask})
    return figures


def loop(z, reference, margin, mask=None):
    """(loss, match rate, share inside the margin), element by element."""
    losses, matches, inside = [], [], []
    for i in range(z.shape[0]):
        for t in range(z.shape[1]):
            if mask is not None and not mask[i, t]:
                continue
            for value, ref in zip(z[i, t].tolist(), reference[i, t].tolist(), strict=True):
                tau = 1 if ref > 0 else -1
                losses.append(max(0.0, margin - tau * value) ** 2)
                matches.append((value > 0) == (ref > 0))
                inside.append(tau * value < margin)
    return tuple(math.fsum(v) / len(v) for v in (losses, matches, inside))


@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 10_000), margin=st.floats(0, 3))
def test_figures_equal_the_loop(masked, seed, margin):
    z, reference, mask = case(seed)
    mask = mask if masked else None
    expected = loop(z, reference, margin, mask)
    sign = reference > 0
    assert loss_of(z, sign, margin, mask).item() == pytest.approx(expected[0], rel=1e-5, abs=1e-9)
    assert figures_of(z, sign, margin, mask).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@given(seed=st.integers(0, 10_000), margins=st.tuples(st.floats(0, 3), st.floats(0, 3)))
def test_the_whole_equation_equals_the_loop(seed, margins):
    boundaries = [Boundary("low", "encoder", 0.25, margins[0]), Boundary("high", "decoder", 1.0, margins[1])]
    (z, reference, mask), (other, other_reference, _) = case(seed), case(seed + 1, (2, 3, 7))
    pairs = {"low": (z, reference), "high": (other, other_reference)}
    masks = {"encoder": mask, "decoder": None}
    signs = Signs.of({name: reference for name, (_, reference) in pairs.items()})
    means = [loop(*pairs[b.name], b.margin, masks[b.stack])[0] for b in boundaries]
    expected = (0.25 * means[0] + 1.0 * means[1]) / 2
    loss = boundary_loss(boundaries, {name: z for name, (z, _) in pairs.items()}, signs, masks)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


@given(seed=st.integers(0, 10_000), margin=st.floats(0.01, 3))
def test_gradient_is_minus_two_tau_hinge_over_count(seed, margin):
    z, reference, _ = case(seed)
    z.requires_grad_()
    loss_of(z, reference > 0, margin).backward()
    tau = reference.double().sign()
    expected = -2 * tau * (margin - tau * z.detach().double()).clamp_min(0) / z.numel()
    torch.testing.assert_close(z.grad.double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_figures_are_float32_whatever_the_model_runs_in(dtype):
    z, reference, _ = case(0)
    z = z.to(dtype)
    for figure in (loss_of(z, reference > 0, 0.5), figures_of(z, reference > 0, 0.5), signed(z, z > 0)):
        assert figure.dtype == torch.float32
    loss, _, _ = loop(z.double(), reference, 0.5)
    assert loss_of(z, reference > 0, 0.5).item() == pytest.approx(loss, rel=1e-5)


def test_zero_counts_as_negative_on_both_sides():
    z = torch.zeros(1, 1, 2)
    assert figures_of(z, z > 0, 0.0).tolist() == [0, 1, 0]


def test_nan_is_not_swallowed():
    z = torch.tensor([[[0.3, float("nan")]]])
    assert loss_of(z, z > 0, 0.5).isnan()


@given(shape=st.lists(st.integers(1, 7), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_signs_survive_packing_at_an_eighth_of_the_bytes(shape, seed):
    sign = torch.rand(shape, generator=torch.Generator(torch.get_default_device()).manual_seed(seed)) < 0.5
    packed = pack_signs(sign)
    assert packed.dtype == torch.uint8 and packed.shape == (shape[0], math.ceil(math.prod(shape[1:]) / 8))
    assert torch.equal(unpack_signs(packed, sign.shape), sign)


def test_layer_weights():
    assert [layer_weight(d, 4) for d in range(4)] == [1 / 16, 4 / 16, 9 / 16, 1.0]
    assert [layer_weight(d, 4, "uniform") for d in range(4)] == [1.0] * 4
