"""Information loss against brute force: least squares over all (dA, dB) in float64, and gradients by autograd."""

import copy
import weakref

import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from helpers import gradients_by_autograd
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from abm_vision import add_lora, information_loss, initialize_lora
from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.gradient import weight_gradients
from abm_vision.abm.merged_linear import BlockLinear
from abm_vision.abm.tangent import leading_energy, reached_energy
from abm_vision.initializers import INITIALIZERS, Needs
from abm_vision.vit import VIT

pytestmark = pytest.mark.usefixtures("device")


def data(count=6, seed=0):
    return images(count, seed=seed).double(), torch.arange(count) % 5


def small_vit():
    """Small enough for least squares over every entry of A and B."""
    return build_vit(embed_dim=16, depth=2, num_heads=2)


def adapted(scale=0.3, **options):
    torch.manual_seed(2)
    model = add_lora(small_vit().double(), **{"rank": 3, **options}).double().eval()
    return randomise(model, scale) if scale else model


def lost_by_least_squares(gradient, directions):
    """||G - nearest combination of the directions||^2 / ||G||^2, G (out, in), directions (n, out, in)."""
    columns = directions.reshape(len(directions), -1).T
    solution = torch.linalg.lstsq(columns.cpu(), gradient.reshape(-1, 1).cpu(), driver="gelsd").solution.to(columns)
    return ((gradient.reshape(-1, 1) - columns @ solution).square().sum() / gradient.square().sum()).item()


def jacobian(layer, adapter="default"):
    """d(s B A) for every trainable entry of A and B, by autograd: (n, out, in)."""
    a, b = layer.lora_A[adapter].weight.detach(), layer.lora_B[adapter]
    mask = b.mask if isinstance(b, BlockLinear) else torch.ones_like(b.weight)
    flags = layer.lora_A[adapter].weight.requires_grad, b.weight.requires_grad

    def weight(a, b):
        return layer.scaling[adapter] * ((b * mask) @ a)

    by_a, by_b = torch.autograd.functional.jacobian(weight, (a, b.weight.detach()))  # (out, in, *factor)
    return torch.cat([j.flatten(2).permute(2, 0, 1) for j, flag in zip((by_a, by_b), flags, strict=True) if flag])


def check(model, x, y):
    report = information_loss(model, [(x, y)], VIT.loss_fn)
    gradients = gradients_by_autograd(model, x, y)
    lost = total = 0
    for layer in report.layers:
        gradient = gradients[layer.name]
        share = lost_by_least_squares(gradient, jacobian(adapted_layers(model, "default")[layer.name]))
        assert layer.loss == pytest.approx(share, abs=1e-5), layer.name  # G is formed in float32
        assert layer.energy == pytest.approx(gradient.square().sum().item(), rel=1e-4)
        lost, total = lost + share * layer.energy, total + layer.energy
    assert report.overall.loss == pytest.approx(lost / total, abs=1e-5)
    return report


@given(
    out=st.integers(1, 6), inputs=st.integers(1, 6), rank=st.integers(1, 4), rank_a=st.integers(0, 4),
    rank_b=st.integers(0, 4), frozen=st.sampled_from(["none", "A", "B"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_projection_against_least_squares(out, inputs, rank, rank_a, rank_b, frozen, seed):
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)

    def factor(rows, columns, of_rank):
        left, right = (torch.randn(*s, generator=generator).double() for s in ((rows, of_rank), (of_rank, columns)))
        return left @ right

    a, b, g = factor(rank, inputs, rank_a), factor(out, rank, rank_b), factor(out, inputs, max(out, inputs))
    by_a, by_b = torch.autograd.functional.jacobian(lambda a, b: b @ a, (a, b))
    kept = [j.flatten(2).permute(2, 0, 1) for j, name in ((by_a, "A"), (by_b, "B")) if frozen != name]
    expected = (1 - lost_by_least_squares(g, torch.cat(kept))) * g.square().sum().item()
    found = reached_energy(g, None if frozen == "B" else a, None if frozen == "A" else b)
    assert found == pytest.approx(expected, abs=1e-8 * g.square().sum().item())


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"qkv": "qv"}, {"alpha": 2, "rank_pattern": {"fc1": 1}}])
@pytest.mark.parametrize("scale", [0, 0.3])
def test_model_against_least_squares(options, scale):
    check(adapted(scale, **options), *data())


def test_factors_that_lack_rank():
    model = adapted()
    with torch.no_grad():
        for layer in adapted_layers(model, "default").values():
            layer.lora_A["default"].weight[2] = 2 * layer.lora_A["default"].weight[0]
            layer.lora_B["default"].weight[:, 1] = 0
    check(model, *data())


@pytest.mark.parametrize("name", [n for n, s in INITIALIZERS.items() if Needs.REFERENCE not in s.needs])
def test_every_start_of_the_table(name):
    torch.manual_seed(2)
    model = add_lora(small_vit(), rank=2)
    x, y = data(16)
    initialize_lora(model, name, [(x.float(), y)], show_progress_bar=False)
    check(model.double().eval(), x, y)


def test_scaling_does_not_enter():
    reports = [information_loss(adapted(alpha=alpha, scale=0), [data()], VIT.loss_fn) for alpha in (1, 64)]
    assert [r.loss for r in reports[0].layers] == pytest.approx([r.loss for r in reports[1].layers], abs=1e-9)


def test_optimum_is_reached_by_the_singular_vectors_and_by_nothing_better():
    model, (x, y) = adapted(0), data(32)
    for name, gradient in gradients_by_autograd(model, x, y).items():
        u, _, vh = torch.linalg.svd(gradient, full_matrices=False)
        layer = adapted_layers(model, "default")[name]
        with torch.no_grad():  # B must not move the model, so that G stays: so small that it does not
            layer.lora_A["default"].weight.copy_(vh[3:6])
            layer.lora_B["default"].weight.copy_(1e-9 * u[:, :3])
    report = information_loss(model, [(x, y)], VIT.loss_fn)
    for layer in report.layers:
        assert layer.loss == pytest.approx(layer.optimum, abs=1e-6)
    others = information_loss(adapted(), [(x, y)])  # by the family's own loss
    assert all(layer.loss >= layer.optimum - 1e-9 for layer in others.layers)


def test_leading_energy_against_the_singular_values():
    matrix = torch.randn(5, 9, generator=torch.Generator(torch.get_default_device()).manual_seed(0)).double()
    expected = torch.linalg.svdvals(matrix).square()
    for count in (1, 3, 5, 8):
        assert leading_energy(matrix, count) == pytest.approx(expected[:count].sum().item())
        assert leading_energy(matrix.T, count) == pytest.approx(expected[:count].sum().item())


def test_random_expectation_is_what_random_adapters_lose_on_average():
    x, y = data()
    losses = []
    for seed in range(40):
        backbone = small_vit()
        torch.manual_seed(seed)
        report = information_loss(add_lora(backbone, rank=3), [(x.float(), y)], VIT.loss_fn)
        losses.append(report.overall.loss)
    spread = torch.tensor(losses).std().item() / len(losses) ** 0.5
    assert sum(losses) / len(losses) == pytest.approx(report.overall.random, abs=4 * spread)
    for layer in report.layers:
        assert layer.random == pytest.approx(1 - 3 / (48 if layer.name.endswith("fc2") else 16))


def test_kinds_and_whole_are_sums():
    report = information_loss(adapted(), [data()], VIT.loss_fn)
    assert [kind.name for kind in report.kinds] == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    for part in report.kinds:
        layers = [layer for layer in report.layers if layer.name.endswith(part.name)]
        assert part.energy == pytest.approx(sum(layer.energy for layer in layers))
        assert part.loss == pytest.approx(sum(layer.energy * layer.loss for layer in layers) / part.energy)
    assert report.overall.energy == pytest.approx(sum(kind.energy for kind in report.kinds))
    content = report.to_dict()
    assert content["overall"]["loss"] == report.overall.loss
    assert len(content["layers"]) == len(report.layers) and content["samples"] == 6
    assert str(report).splitlines()[-1].startswith("all ")


def test_several_batches_are_one():
    model, (x, y) = adapted(), data()
    whole = information_loss(model, [(x, y)], VIT.loss_fn)
    parts = information_loss(model, iter([(x[:1], y[:1]), (x[1:], y[1:])]), VIT.loss_fn)
    for one, other in zip(whole.layers, parts.layers, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=1e-4) and one.loss == pytest.approx(other.loss, abs=1e-5)


SIDES = {"test_vit": 32, "eva02_tiny_patch14_224": 28, "xcit_nano_12_p16_224": 32, "swin_tiny_patch4_window7_224": 56}


@pytest.mark.parametrize("name", SIDES)
def test_gradients_of_other_models_against_autograd(name):
    side = SIDES[name]
    torch.manual_seed(0)
    sized = {} if name.startswith("xcit") else {"img_size": side}
    model = timm.create_model(name, num_classes=5, **sized)
    model = randomise(add_lora(model.double(), rank=2).double().eval(), 0.05)
    x, y = images(2, side).double(), torch.tensor([0, 3])
    found = {}
    weight_gradients(model, [(x, y)], VIT.loss_fn, found.__setitem__)
    for layer, gradient in gradients_by_autograd(model, x, y).items():
        near = {"rtol": 1e-3, "atol": 1e-5 * gradient.abs().max().item()}  # G is formed in float32
        torch.testing.assert_close(found[layer].double(), gradient.flatten(1), **near)


def test_one_gradient_at_a_time():
    model, earlier = adapted(), []

    def receive(name, gradient):
        assert all(reference() is None for reference in earlier), f"another gradient is alive when {name} is formed"
        earlier.append(weakref.ref(gradient))

    weight_gradients(model, [data()], VIT.loss_fn, receive)
    assert len(earlier) == len(adapted_layers(model, "default"))


def test_layer_that_is_called_twice_has_one_gradient():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x).tanh())

    torch.manual_seed(0)
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False))
    x = torch.randn(5, 4)
    bare = copy.deepcopy(model).merge_and_unload()
    weight = bare.layer.weight.requires_grad_()
    (expected,) = torch.autograd.grad(bare(x).square().mean(), weight)
    found = {}
    weight_gradients(model, [x], lambda m, batch: m(batch).square().mean(), found.__setitem__)
    torch.testing.assert_close(found["layer"], expected)


def test_gradient_checkpointing_changes_nothing():
    model = adapted()
    plain = information_loss(model, [data()], VIT.loss_fn)
    model.get_base_model().set_grad_checkpointing(True)

    def loss(model, batch):
        model.train()  # timm checkpoints in training mode alone; there is no dropout in this model
        return VIT.loss_fn(model, batch)

    again = information_loss(model, [data()], loss)
    assert [r.loss for r in again.layers] == pytest.approx([r.loss for r in plain.layers], abs=1e-9)
    assert not model.training


def test_everything_is_given_back():
    model = adapted().train()
    model.zero_grad()
    flags = [p.requires_grad for p in model.parameters()]
    information_loss(model, [data()], VIT.loss_fn)
    assert all(p.grad is None for p in model.parameters()) and flags == [p.requires_grad for p in model.parameters()]
    assert model.training and not any(m._forward_hooks for m in model.modules())


def refused(message, model=None, batches=None, loss=VIT.loss_fn, **options):
    with pytest.raises(ValueError, match=message):
        information_loss(model or adapted(), [data()] if batches is None else batches, loss, **options)


def test_refused():
    refused("VisionTransformer is no PeftModel", model=small_vit())
    refused("at least one batch", batches=[])
    refused("there is no adapter 'other'; the model has 'default'", adapter_name="other")
    refused("holds no labels.*loss_fn=lambda", batches=[images(2).double()])
    refused(r"scalar tensor.*returned a tensor \(6, 5\)", loss=lambda m, b: m(b[0]))
    refused("scalar tensor.*returned float", loss=lambda m, b: 1.0)
    refused("does not depend on the adapter", loss=lambda m, b: torch.ones((), dtype=torch.float64))
    refused("the loss is nan", loss=lambda m, b: VIT.loss_fn(m, b) * float("nan"))
    refused("DoRA", model=adapted(dora=True))
    merged = adapted()
    merged.merge_adapter()
    refused("merged into the base weights", model=merged)
    frozen = adapted()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lora_" not in name and parameter.requires_grad)
    refused("frozen.*is_trainable=True", model=frozen)
    second = add_lora(adapted(), rank=2, adapter_name="second")
    second.set_adapter("second")
    refused("active adapters are", model=second)


def test_half_precision_factors_still_span_something():
    model = adapted()
    whole = information_loss(model, [data()], VIT.loss_fn).overall.loss
    for layer in adapted_layers(model, "default").values():
        layer.lora_A.bfloat16()
        layer.lora_B.bfloat16()
    assert information_loss(model, [data()], VIT.loss_fn).overall.loss == pytest.approx(whole, abs=0.05)


def test_layers_without_an_adapter_lose_everything():
    model = adapted()
    whole = information_loss(model, [data()], VIT.loss_fn)
    some = randomise(add_lora(small_vit().double(), rank=3, targets=["attn.qkv"]).double().eval(), 0)
    absent = [layer.name for layer in whole.layers if not layer.name.endswith("attn.qkv")]
    report = information_loss(some, [data()], VIT.loss_fn, unadapted=absent)
    assert [layer.name for layer in report.layers] == [layer.name for layer in whole.layers]
    gradients = gradients_by_autograd(some, *data(), absent)
    for layer in report.layers:
        if layer.name in absent:
            assert layer.loss == layer.optimum == layer.random == 1
            assert layer.energy == pytest.approx(gradients[layer.name].square().sum().item(), rel=1e-4)
    assert not any(some.get_base_model().get_submodule(name).weight.requires_grad for name in absent)
