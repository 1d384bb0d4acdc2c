"""The layer that trains on merged weights against stock peft's, in float64 to 1e-10."""

import copy

import pytest
import torch
from conftest import build_vit, images, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from abm_vision import add_lora
from abm_vision.abm import merged_linear
from abm_vision.abm.merged_linear import MergedLinear, merged_linear_factory

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


class OneLinear(nn.Module):
    def __init__(self, features_in=6, features_out=9, bias=True, dtype=torch.float64):
        super().__init__()
        self.layer = nn.Linear(features_in, features_out, bias, dtype=dtype)

    def forward(self, x):
        return self.layer(x)


def pair(model, merged=True, **options):
    """The same adapted model twice: with peft's layer and with ours."""
    models = []
    for ours in (False, True):
        config = LoraConfig(target_modules=["layer"], init_lora_weights=False, **options)
        if ours:
            config._register_custom_module({nn.Linear: merged_linear_factory})
        torch.manual_seed(0)
        models.append(get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False))
    theirs, ours = models
    assert isinstance(ours.base_model.model.layer, MergedLinear)
    assert type(theirs.base_model.model.layer) is not MergedLinear
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def outcome(model, x, weight=None):
    """Output and every gradient of a weighted sum of it."""
    x = x.clone().requires_grad_()
    out = model(x)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out) if weight is None else weight
    (out * weight).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"output": out.detach(), "x": x.grad, **gradients}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}", **tolerance or TIGHT)


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the merged product ran."""
    count = []
    original = merged_linear._MergedLoRA.apply
    monkeypatch.setattr(merged_linear._MergedLoRA, "apply", lambda *a: count.append(1) or original(*a))
    return count


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    features=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    rank=st.integers(1, 9),
    alpha=st.sampled_from([1, 3, 16]),
    bias=st.booleans(),
    rslora=st.booleans(),
)
def test_equals_peft_for_every_shape(shape, features, rank, alpha, bias, rslora):
    torch.manual_seed(1)
    theirs, ours = pair(OneLinear(*features, bias), r=rank, lora_alpha=alpha, use_rslora=rslora)
    x = torch.randn(*shape, features[0], dtype=torch.float64)
    assert_same(outcome(ours, x), outcome(theirs, x))


def test_merged_product_is_used_where_it_pays(calls):
    theirs, ours = pair(OneLinear(64, 64), r=4)
    few, enough = torch.randn(3, 64, dtype=torch.float64), torch.randn(4, 8, 64, dtype=torch.float64)
    assert_same(outcome(ours, few), outcome(theirs, few))
    assert not calls
    assert_same(outcome(ours, enough), outcome(theirs, enough))
    assert len(calls) == 1


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_frozen_factor(calls, frozen):
    theirs, ours = pair(OneLinear(), r=3)
    for model in (theirs, ours):
        for name, parameter in model.named_parameters():
            if frozen in name:
                parameter.requires_grad_(False)
    x = torch.randn(20, 6, dtype=torch.float64)
    found = outcome(ours, x)
    assert_same(found, outcome(theirs, x))
    assert calls and not any(frozen in name for name in found)


def test_trained_bias(calls):
    theirs, ours = pair(OneLinear(), r=3, bias="all")
    x = torch.randn(20, 6, dtype=torch.float64)
    found = outcome(ours, x)
    assert_same(found, outcome(theirs, x))
    assert calls and any(name.endswith("base_layer.bias") for name in found)


def test_input_without_gradient(calls):
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    for model in (theirs, ours):
        model(x).square().sum().backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, **TIGHT, msg=name)
    assert calls


def test_second_derivative_is_refused_rather_than_wrong():
    _, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(ours(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast_as_near_to_the_truth_as_peft(calls, base):
    """Both round to bfloat16, at different places: neither equals the other, both are near the float64 result."""
    torch.manual_seed(2)
    model = OneLinear(32, 48, dtype=torch.float32)
    theirs, ours = pair(model, r=4)
    exact, _ = pair(copy.deepcopy(model).double(), r=4)
    exact.load_state_dict({k: v.double() for k, v in theirs.state_dict().items()})
    for adapted in (theirs, ours):
        adapted.base_model.model.layer.base_layer.to(base)
    exact.base_model.model.layer.base_layer.load_state_dict(theirs.base_model.model.layer.base_layer.state_dict())
    x = torch.randn(8, 16, 32)
    truth = outcome(exact, x.double())
    errors = {}
    for name, adapted in (("theirs", theirs), ("ours", ours)):
        with torch.autocast("cpu", torch.bfloat16):
            found = outcome(adapted, x, torch.linspace(-1, 1, 8 * 16 * 48).view(8, 16, 48))
        assert found["output"].dtype == torch.bfloat16
        errors[name] = {
            k: ((found[k].double() - v).norm() / v.norm()).item() for k, v in truth.items() if "bias" not in k
        }
        assert {k: v.dtype for k, v in found.items() if "lora" in k} == dict.fromkeys(
            [k for k in found if "lora" in k], torch.float32
        )
    assert calls
    for key, error in errors["ours"].items():
        assert error < max(1.5 * errors["theirs"][key], 0.004), (key, errors)


def test_mixed_dtypes_without_autocast_fall_back(calls):
    """peft casts the input of A itself; what `nn.Linear` would refuse is left to it."""
    theirs, ours = pair(OneLinear(dtype=torch.float32), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    messages = []
    for model in (theirs, ours):
        with pytest.raises(RuntimeError) as caught:
            model(x)
        messages.append(str(caught.value))
    assert messages[0] == messages[1] and not calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(calls, reentrant):
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)

    def through(model):
        return lambda x: checkpoint(model, x, use_reentrant=reentrant)

    results = []
    for model in (theirs, ours):
        z = x.clone().requires_grad_()
        through(model)(z).square().sum().backward()
        results.append({"x": z.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert_same(results[1], results[0])
    assert len(calls) == 2


def test_gradient_accumulation(calls):
    theirs, ours = pair(OneLinear(), r=3)
    for model in (theirs, ours):
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(20, 6, dtype=torch.float64, generator=generator)).square().sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert_same(grads[1], grads[0])
    assert len(calls) == 3


def test_compiled_whole():
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = {k.removeprefix("_orig_mod."): v for k, v in outcome(compiled, x).items()}
    assert_same(found, outcome(theirs, x))


def test_adapter_off_merged_and_unmerged():
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    base = theirs.base_model.model.layer.base_layer
    expected = theirs(x)
    with ours.disable_adapter():
        assert torch.equal(ours(x), base(x))
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    torch.testing.assert_close(ours.base_model.model.layer.base_layer(x), expected, **TIGHT)
    ours.unmerge_adapter()
    torch.testing.assert_close(ours.base_model.model.layer.base_layer(x), base(x), **TIGHT)
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    assert type(ours.merge_and_unload().layer) is nn.Linear


def test_two_adapters_switched_and_together(calls):
    theirs, ours = pair(OneLinear(), r=3)
    for model in (theirs, ours):
        config = LoraConfig(target_modules=["layer"], r=2, lora_alpha=5, init_lora_weights=False)
        if model is ours:
            config._register_custom_module({nn.Linear: merged_linear_factory})
        torch.manual_seed(3)
        model.add_adapter("second", config, autocast_adapter_dtype=False)
    x = torch.randn(20, 6, dtype=torch.float64)
    for active, merged in (("second", 1), ("default", 1), (["default", "second"], 0)):
        calls.clear()
        for model in (theirs, ours):
            model.base_model.set_adapter(active)
        assert_same(outcome(ours, x), outcome(theirs, x))
        assert len(calls) == merged, active


def test_mixed_adapters_in_one_batch_are_pefts_own(calls):
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(4, 6, dtype=torch.float64)
    names = ["default", "__base__", "default", "__base__"]
    outputs = [m.eval()(x, adapter_names=names) for m in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], **TIGHT)
    assert not calls


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}])
def test_where_it_does_not_apply_pefts_forward_runs(calls, options):
    theirs, ours = pair(OneLinear(), r=3, **options)
    x = torch.randn(20, 6, dtype=torch.float64)
    results = []
    for model in (theirs, ours):
        torch.manual_seed(7)
        results.append(outcome(model.train(), x))
    assert_same(results[1], results[0])
    assert not calls


def test_dropout_in_eval_mode_is_none_at_all(calls):
    theirs, ours = pair(OneLinear(), r=3, lora_dropout=0.5)
    x = torch.randn(20, 6, dtype=torch.float64)
    assert_same(outcome(ours.eval(), x), outcome(theirs.eval(), x))
    assert len(calls) == 1


@pytest.mark.parametrize("inner", ["base_layer", "lora_A", "lora_B"])
def test_hook_on_an_inner_module_still_fires(calls, inner):
    _, ours = pair(OneLinear(), r=3)
    layer = ours.base_model.model.layer
    module = layer.base_layer if inner == "base_layer" else getattr(layer, inner)["default"]
    fired = []
    module.register_forward_hook(lambda *_: fired.append(1))
    ours(torch.randn(20, 6, dtype=torch.float64))
    assert fired and not calls


@pytest.mark.parametrize("inner", ["base_layer", "lora_A", "lora_B"])
def test_wrapped_inner_module_is_called(calls, inner):
    """As FSDP 1 wraps them: outside its own forward pass a wrapped module has no usable weight."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.inside = module

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inside" else getattr(self.inside, name)

        def forward(self, x):
            return self.inside(x)

    theirs, ours = pair(OneLinear(), r=3)
    layer = ours.base_model.model.layer
    if inner == "base_layer":
        layer.base_layer = Wrapper(layer.base_layer)
    else:
        getattr(layer, inner)["default"] = Wrapper(getattr(layer, inner)["default"])
    x = torch.randn(20, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert not calls


def test_only_plain_linear_layers_are_replaced():
    class Quantised(nn.Linear):
        pass

    config = LoraConfig(r=2, target_modules=["layer"])
    assert merged_linear_factory(Quantised(4, 4), "default", config, r=2, lora_alpha=2) is None
    assert merged_linear_factory(nn.Conv2d(4, 4, 1), "default", config, r=2, lora_alpha=2) is None


@pytest.mark.parametrize("qkv", ["full", "qv"])
def test_whole_vit_equals_stock_peft_in_training(calls, qkv):
    """Ten steps of AdamW with each: the same losses and the same weights, to double precision."""
    losses, states = [], []
    for merged in (False, True):
        torch.manual_seed(0)
        model = add_lora(build_vit().double(), rank=4, qkv=qkv, merged_linear=merged)
        model = randomise(model.double().train())
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
        losses.append([])
        for step in range(10):
            x = images(8, seed=step).double()
            loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 5)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
        states.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
    assert len(calls) >= 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-10) and losses[0][-1] < losses[0][0]
    assert_same(states[1], states[0], rtol=1e-7, atol=1e-9)
