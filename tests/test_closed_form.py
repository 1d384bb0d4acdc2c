"""Layer-local matching against a generic minimiser in double precision, and figures from two models."""

import copy

import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from helpers import factors, figures, match, rows_of, same, values

from abm_vision import ABMConfig, add_lora
from abm_vision.abm import closed_form
from abm_vision.abm.adapter import adapted_layers

pytestmark = pytest.mark.usefixtures("device")

LOCAL = ABMConfig(fit="local", samples=8)


def minimised(z, u, tau, start, margin):
    """The same problem by L-BFGS in double precision."""
    z, u, tau, start = (t.double() for t in (z, u, tau, start))
    b = start.clone().requires_grad_()
    ridge = closed_form.RIDGE * u.square().mean()

    def objective():
        short = (margin - tau * (z + u @ b.T)).clamp_min(0)
        return short.square().sum() / len(u) / 2 + ridge * (b - start).square().sum() / 2

    optimiser = torch.optim.LBFGS([b], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimiser.step(closure)
    return b.detach(), objective().item()


@pytest.mark.parametrize("margin", [0.2, 1.0])
def test_newton_against_a_generic_minimiser(margin):
    generator = torch.Generator(torch.get_default_device()).manual_seed(0)
    z, u, start = (torch.randn(*s, generator=generator) for s in ((200, 12), (200, 3), (12, 3)))
    tau = torch.where(torch.randn(200, 12, generator=generator) > -0.5, z, -z).sign()
    found, losses = closed_form._newton(z, u, tau, start, margin)
    expected, _ = minimised(z, u, tau, start, margin)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)
    first = (margin - tau * (z + u @ start.T)).clamp_min(0).square().mean().item()
    assert losses[0].item() == pytest.approx(first, rel=1e-5) and losses[-1] < losses[0]


def test_margin_zero_and_a_fresh_adapter_have_nothing_to_do():
    model = add_lora(build_vit())
    report = match(model, config=ABMConfig(fit="local", margin=0, samples=8))
    assert report.before == report.after and set(report.loss_per_step) == {0.0}
    assert not any(p.any() for n, p in factors(model).items() if "lora_B" in n)


def test_figures_against_two_models_and_what_is_fitted():
    pretrained = build_vit().eval()
    model = add_lora(copy.deepcopy(pretrained))
    before = values(model)
    batches = [images(6, seed=0), images(2, seed=1)]
    report = match(model, batches, LOCAL)
    after = figures(model, pretrained, batches, 0.5)
    torch.testing.assert_close(rows_of(report, "after"), after, rtol=1e-4, atol=1e-5)
    changed = {n for n, p in values(model).items() if not torch.equal(p, before[n])}
    assert changed == {f"base_model.model.blocks.{i}.mlp.fc1.lora_B.default.weight" for i in range(6)}
    assert report.after.loss < report.before.loss and len(report.loss_per_step) == closed_form.NEWTON_STEPS + 1
    assert report.loss_per_step[-1] < report.loss_per_step[0]
    assert "each on its own" in str(report)


def test_a_layer_is_fitted_to_what_the_layers_below_make_of_the_samples():
    """The last layer's B is the minimiser for inputs recorded from the fitted model, to the pretrained signs."""
    pretrained = build_vit().eval()
    model = add_lora(copy.deepcopy(pretrained))
    batch = images(48)
    match(model, [batch], ABMConfig(fit="local", samples=48))
    caught = {}
    layer = adapted_layers(model, "default")["blocks.5.mlp.fc1"]
    handle = layer.register_forward_pre_hook(lambda m, args: caught.update(x=args[0].detach().flatten(0, -2)))
    model.eval()(batch)
    handle.remove()
    signs = {}
    handle = pretrained.blocks[5].mlp.act.register_forward_pre_hook(lambda m, args: signs.update(z=args[0].detach()))
    pretrained(batch)
    handle.remove()
    tau = torch.where(signs["z"].flatten(0, -2) > 0, 1.0, -1.0)
    u = layer.scaling["default"] * caught["x"] @ layer.lora_A["default"].weight.T
    z = layer.base_layer(caught["x"])
    expected, _ = minimised(z.detach(), u.detach(), tau, torch.zeros_like(layer.lora_B["default"].weight), 0.5)
    torch.testing.assert_close(layer.lora_B["default"].weight.double(), expected, rtol=0, atol=2e-3)


def test_reference_may_be_another_adapter_and_masks_count():
    model = randomise(add_lora(add_lora(build_vit()), adapter_name="tuned"), adapter="tuned")
    report = match(model, config=LOCAL, reference="tuned")
    assert report.before.match < 0.999 and report.after.match > report.before.match
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, 1:3] = True
    one, other = (add_lora(build_vit()) for _ in range(2))
    other.load_state_dict(one.state_dict())
    match(one, [images(4)], ABMConfig(fit="local", samples=4), token_mask_fn=lambda batch, stack: mask)
    match(other, [images(4)], ABMConfig(fit="local", samples=4))
    assert not same(values(one), values(other))


def test_chosen_layers_alone():
    model = add_lora(build_vit())
    match(model, config=ABMConfig(fit="local", layers=["blocks.2.mlp.act"], samples=8))
    moved = [n for n, p in factors(model).items() if "lora_B" in n and p.any()]
    assert moved == ["base_model.model.blocks.2.mlp.fc1.lora_B.default.weight"]


def test_hooks_and_modes_are_given_back():
    model = add_lora(build_vit()).train()
    match(model, config=LOCAL)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_activation_without_an_adapted_projection_in_front():
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act.* has none\. Adapt the MLP, or use fit"):
        match(add_lora(build_vit(), targets="attention"), config=LOCAL)
    packed = timm.create_model(
        "vit_giant_patch14_dinov2", img_size=28, embed_dim=32, depth=2, num_heads=2, num_classes=3
    )
    with pytest.raises(ValueError, match="output goes straight into the activation"):
        match(add_lora(packed), [images(4, side=28)], LOCAL)
    with pytest.raises(ValueError, match="fit=.local. is made for .*DoRA"):
        match(add_lora(build_vit(), dora=True), config=LOCAL)
    with pytest.raises(ValueError, match="fit is 'block'; allowed are 'end_to_end', 'local'"):
        ABMConfig(fit="block")
