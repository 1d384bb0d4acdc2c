"""The layer that trains on merged weights against stock peft's, in float64 to 1e-10."""

import copy
import functools
import pickle

import pytest
import torch
from conftest import build_vit, images, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from abm_vision import add_lora
from abm_vision.abm import merged_linear
from abm_vision.abm.lora import restrict_to_blocks
from abm_vision.abm.merged_linear import BlockLinear, MergedLinear, is_plain, merged_linear_factory

pytestmark = pytest.mark.usefixtures("device")

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


# Second derivatives


def second_order(model, x):
    """Derivatives of a function of first derivatives: a gradient penalty, as in WGAN-GP."""
    x = x.clone().requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(model(x).float().pow(3).sum(), [x, *trained], create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), [x, *trained])
    return dict(enumerate((*first, *second)))


@pytest.mark.parametrize("bias", ["none", "all"])
def test_gradient_penalty(calls, bias):
    theirs, ours = pair(OneLinear(), r=3, bias=bias)
    x = torch.randn(20, 6, dtype=torch.float64)
    assert_same(second_order(ours.double(), x), second_order(theirs.double(), x), rtol=1e-5, atol=1e-5)
    assert calls


def test_gradient_penalty_under_autocast_is_as_near_to_the_truth_as_pefts(calls):
    theirs, ours = pair(OneLinear(32, 48, dtype=torch.float32), r=4)
    x = torch.randn(64, 32)
    truth = second_order(copy.deepcopy(theirs).double(), x.double())
    errors = {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            found = second_order(model, x)
        errors[name] = {k: ((found[k].double() - v).norm() / v.norm()).item() for k, v in truth.items()}
    assert calls
    for key, error in errors["ours"].items():
        assert error < max(1.5 * errors["theirs"][key], 0.004), (key, errors)


def test_gradgradcheck(calls):
    _, ours = pair(OneLinear(4, 5), r=2)
    names, values = zip(*[(n, p) for n, p in ours.named_parameters() if p.requires_grad], strict=True)

    def run(x, *parameters):
        return functional_call(ours, dict(zip(names, parameters, strict=True)), (x,))

    given = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True), *values)
    assert torch.autograd.gradcheck(run, given) and torch.autograd.gradgradcheck(run, given)
    assert calls


def adapted_vits(**options):
    """An adapted ViT in double precision, with peft's layer and with ours."""
    torch.manual_seed(0)
    base = build_vit().double()
    models = [add_lora(copy.deepcopy(base), rank=4, merged_linear=merged, **options) for merged in (False, True)]
    models[1].load_state_dict(models[0].double().state_dict())
    return [randomise(m.double()).eval() for m in models]


@pytest.mark.parametrize("qkv", ["full", "qv"])
@sdpa_kernel(SDPBackend.MATH)  # the others have no second derivative
def test_hessian_through_a_vit(calls, qkv):
    x = images(8).double()
    theirs, ours = (
        torch.autograd.functional.hessian(lambda s, m=m: m(x * s).logsumexp(-1).sum(), torch.tensor(1.0).double())
        for m in adapted_vits(qkv=qkv)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert theirs.abs() > 1e-3 and calls


@sdpa_kernel(SDPBackend.MATH)
def test_inner_step_of_maml(calls):
    """Parameters that are functions of parameters: the outer gradient goes through the inner one."""
    outer, x = [], images(8).double()
    for model in adapted_vits():
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        inner = torch.autograd.grad(model(x).square().sum(), list(trained.values()), create_graph=True)
        stepped = {n: p - 0.1 * g for (n, p), g in zip(trained.items(), inner, strict=True)}
        loss = functional_call(model, stepped, (x,)).logsumexp(-1).sum()
        outer.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    assert_same(outer[1], outer[0], rtol=1e-7, atol=1e-9)
    assert calls


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
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
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
            generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
            model(torch.randn(20, 6, dtype=torch.float64, generator=generator)).square().sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (theirs, ours)]
    assert_same(grads[1], grads[0])
    assert len(calls) == 3


@pytest.mark.slow
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


# Inner modules that are no plain calls


def inner_module(model, name):
    layer = model.base_model.model.layer
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


def twice(module, x):
    return 2 * type(module).forward(module, x)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


TAMPER = {
    "forward": lambda m: setattr(m, "forward", functools.partial(twice, m)),  # as accelerate's hooks
    "method": lambda m: setattr(m, "forward", twice.__get__(m)),
    "class": lambda m: setattr(
        m, "__class__", type("Custom", (type(m),), {"forward": lambda s, x: x.cos() @ x.sin().T})
    ),
    "compiled": lambda m: setattr(m, "_compiled_call_impl", functools.partial(twice, m)),  # as nn.Module.compile
    "pre_hook": lambda m: m.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
    "pre_hook_kwargs": lambda m: m.register_forward_pre_hook(lambda _, a, k: ((2 * a[0],), k), with_kwargs=True),
    "hook": lambda m: m.register_forward_hook(lambda _, given, out: 2 * out),
    "hook_always": lambda m: m.register_forward_hook(lambda _, given, out: 2 * out, always_call=True),
    "backward_hook": lambda m: m.register_full_backward_hook(lambda _, ins, outs: (2 * ins[0],)),
    "backward_pre_hook": lambda m: m.register_full_backward_pre_hook(lambda _, outs: (2 * outs[0],)),
}
TAMPER_LINEAR = {
    "parametrized": lambda m: parametrize.register_parametrization(m, "weight", Twice()),
    "weight_norm": lambda m: nn.utils.weight_norm(m).weight_g.data.mul_(2),
    "new_weight_norm": lambda m: parametrizations.weight_norm(m),
    "spectral_norm": lambda m: nn.utils.spectral_norm(m.eval()),
    "pruned": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "bias": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(len(m.weight), dtype=torch.float64))),
}
CASES = [(i, t) for i in ("base_layer", "lora_A", "lora_B", "lora_dropout") for t in TAMPER] + [
    (i, t) for i in ("base_layer", "lora_A", "lora_B") for t in TAMPER_LINEAR if (i, t) != ("base_layer", "bias")
]


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize(("inner", "how"), CASES)
def test_inner_module_that_is_no_plain_call_is_called(calls, inner, how):
    theirs, ours = pair(OneLinear(6, 6), r=6, lora_alpha=7)
    x = torch.randn(6, 6, dtype=torch.float64)
    untouched = theirs(x)
    for model in (theirs, ours):
        torch.manual_seed(3)
        (TAMPER | TAMPER_LINEAR)[how](inner_module(model, inner))
    assert_same(outcome(ours, x), outcome(theirs, x))
    assert not calls
    assert "backward" in how or how in ("new_weight_norm",) or not torch.allclose(theirs(x), untouched)


@pytest.mark.parametrize("dropout", [nn.AlphaDropout(0.5), nn.Dropout1d(0.5), nn.Dropout(0.5), Twice()])
def test_other_dropout_module_in_its_place(calls, dropout):
    models = pair(OneLinear(), r=3)
    results = []
    for model in models:
        model.base_model.model.layer.lora_dropout["default"] = copy.deepcopy(dropout).train()
        torch.manual_seed(5)
        results.append(outcome(model, torch.ones(2, 20, 6, dtype=torch.float64)))
    assert_same(results[1], results[0])
    assert not calls


def test_hooks_on_all_modules_see_the_inner_ones(calls):
    theirs, ours = pair(OneLinear(), r=3)
    x, seen = torch.randn(20, 6, dtype=torch.float64), []
    for model in (theirs, ours):
        handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
        try:
            model(x)
        finally:
            handle.remove()
    half = len(seen) // 2
    assert [t for t in seen[:half] if t is nn.Linear] == [t for t in seen[half:] if t is nn.Linear] == [nn.Linear] * 3
    assert not calls


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_offloaded_by_accelerate(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    results = []
    for model in adapted_vits():
        x, before = images(8).double(), model(images(8).double())
        if where == "disk":
            accelerate.disk_offload(model, tmp_path / str(len(results)), torch.device("cpu"))
        else:
            accelerate.cpu_offload(model, torch.device("cpu"))
        results.append(model(x))
        torch.testing.assert_close(results[-1], before, **TIGHT)


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


# Tensors that are no plain matrices


class Stored(torch.Tensor):
    """A weight that is held in another form than it is computed with, as torchao's: here, halved."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is not nn.functional.linear:
            return super().__torch_function__(func, types, args, kwargs or {})
        return func(*[2 * a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args], **(kwargs or {}))


@pytest.mark.parametrize("inner", ["base_layer", "lora_A", "lora_B"])
def test_tensor_subclass_as_weight(calls, inner):
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    expected = outcome(theirs, x)
    for model in (theirs, ours):
        module = inner_module(model, inner)
        weight = (module.weight.detach() / 2).as_subclass(Stored)
        assert not is_plain(weight)
        del module.weight
        module.weight = nn.Parameter(weight, requires_grad=False)
    found = {k: v for k, v in outcome(ours, x).items() if k in ("output", "x")}
    assert_same(found, {k: expected[k] for k in found})
    assert not calls


@pytest.mark.parametrize("when", ["before", "after"])
def test_torchao(when):
    torchao = pytest.importorskip("torchao.quantization")
    quantise = functools.partial(torchao.quantize_, config=torchao.Int8WeightOnlyConfig())
    base, outputs = OneLinear(64, 64, dtype=torch.float32), []
    layers = []
    for ours in (False, True):
        config, model = LoraConfig(target_modules=["layer"], init_lora_weights=False), copy.deepcopy(base)
        if ours:
            config._register_custom_module({nn.Linear: merged_linear_factory})
        if when == "before":
            quantise(model)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        if when == "after":
            quantise(model, filter_fn=lambda m, name: name.endswith("base_layer"))
        layers.append(model.base_model.model.layer)
        outputs.append(outcome(model, torch.linspace(-1, 1, 40 * 64).view(40, 64)))
    assert_same(outputs[1], outputs[0])
    assert when == "after" or type(layers[1]) is type(layers[0])  # peft's own torchao layer


@pytest.fixture
def world_of_one(device, tmp_path):
    if device != "cpu":
        pytest.skip("test_gpu.py has a group of NCCL's")
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["fully_shard", "distribute_module", "parallelize_module"])
def test_distributed_tensors(world_of_one, how):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    results = []
    for model in pair(OneLinear(), r=3):
        x = torch.linspace(-1, 1, 120, dtype=torch.float64).view(20, 6)
        if how == "fully_shard":
            fully_shard(model, mesh=world_of_one)
        elif how == "distribute_module":
            distribute_module(model, world_of_one)
            x = distribute_tensor(x, world_of_one)
        else:
            plan = {"base_layer": ColwiseParallel(), "lora_B.default": ColwiseParallel()}
            parallelize_module(model.base_model.model.layer, world_of_one, plan)
        found = outcome(model, x, 1.0)
        results.append({k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in found.items()})
    assert_same(results[1], results[0])


@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
def test_complex_numbers():
    theirs, ours = (model.to(torch.complex128) for model in pair(OneLinear(), r=3))
    x = torch.randn(20, 6, dtype=torch.complex128)
    results = []
    for model in (theirs, ours):
        z = x.clone().requires_grad_()
        model(z).abs().sum().backward()
        results.append({"x": z.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}})
    assert_same(results[1], results[0])


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_and_sparse_inputs(calls):
    theirs, ours = pair(OneLinear(), r=3)
    rows = torch.randn(20, 6, dtype=torch.float64)
    for x in (torch.nested.nested_tensor([rows, rows[:9]]), rows.to_sparse()):
        found, expected = ours(x), theirs(x)
        if x.is_nested:
            found, expected = torch.cat(found.unbind()), torch.cat(expected.unbind())
        torch.testing.assert_close(found, expected, **TIGHT)
    assert not calls


def test_sparse_base_weight(calls):
    models = pair(OneLinear(bias=False), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    expected = models[0](x)
    for model in models:
        base = inner_module(model, "base_layer")
        base.weight = nn.Parameter(base.weight.detach().to_sparse(), requires_grad=False)
    torch.testing.assert_close(models[1](x), expected, **TIGHT)
    assert not calls


def test_float8_storage_under_autocast():
    models = pair(OneLinear(16, 16, dtype=torch.float32), r=3)
    for model in models:
        inner_module(model, "base_layer").to(torch.float8_e4m3fn)
    results = []
    for model in models:
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            try:
                results.append(model(torch.ones(64, 16)))
            except RuntimeError as error:
                results.append(str(error))
    assert str(results[0]) == str(results[1])


def test_model_on_meta():
    theirs, ours = (model.to("meta") for model in pair(OneLinear(), r=3))
    x = torch.randn(20, 6, dtype=torch.float64, device="meta")
    assert ours(x).shape == theirs(x).shape == (20, 9) and ours(x).is_meta


def test_adapted_on_meta_and_filled_later(calls):
    with torch.device("meta"):
        model = OneLinear()
    theirs, ours = pair(OneLinear(), r=3)
    config = LoraConfig(target_modules=["layer"], r=3)
    config._register_custom_module({nn.Linear: merged_linear_factory})
    late = get_peft_model(model, config, autocast_adapter_dtype=False)
    late.load_state_dict(theirs.state_dict(), assign=True)
    x = torch.randn(20, 6, dtype=torch.float64)
    torch.testing.assert_close(late(x), theirs(x), **TIGHT)
    assert calls


# Transforms, forward mode, graphs


def parameters_of(model):
    return {n: p.detach() for n, p in model.named_parameters()}


TRANSFORMS = {
    "grad": lambda run, p, x: torch.func.grad(lambda p: run(p, x).square().sum())(p),
    "grad_x": lambda run, p, x: {"x": torch.func.grad(lambda x: run(p, x).square().sum())(x)},
    "vmap": lambda run, p, x: {"out": torch.func.vmap(lambda x: run(p, x))(x.expand(3, *x.shape))},
    "vmap_parameters": lambda run, p, x: {
        "out": torch.func.vmap(run, in_dims=(dict.fromkeys(p, 0), None))(
            {k: v.expand(3, *v.shape) for k, v in p.items()}, x
        )
    },
    "per_sample": lambda run, p, x: torch.func.vmap(
        torch.func.grad(lambda p, x: run(p, x).square().sum()), in_dims=(None, 0)
    )(p, x),
    "jvp": lambda run, p, x: {"out": torch.func.jvp(lambda x: run(p, x), (x,), (x.cos(),))[1]},
    "jvp_parameters": lambda run, p, x: {
        "out": torch.func.jvp(lambda p: run(p, x), (p,), ({k: v.cos() for k, v in p.items()},))[1]
    },
    "jacrev": lambda run, p, x: torch.func.jacrev(lambda p: run(p, x))(p),
    "hessian": lambda run, p, x: {"h": torch.func.hessian(lambda s: run(p, x * s).pow(3).sum())(x.new_tensor(1.0))},
    "batched_gradients": lambda run, p, x: {
        "h": torch.autograd.functional.jacobian(lambda x: run(p, x), x, vectorize=True)
    },
    "vectorised_hessian": lambda run, p, x: {
        "h": torch.autograd.functional.hessian(lambda x: run(p, x).pow(3).sum(), x, vectorize=True)
    },
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name):
    results = []
    for model in pair(OneLinear(), r=3):
        x = torch.linspace(-1, 1, 120, dtype=torch.float64).view(20, 6)
        run = functools.partial(lambda m, p, x: functional_call(m, p, (x,)), model)
        results.append(TRANSFORMS[name](run, parameters_of(model), x))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("dual", ["x", "lora_A", "lora_B"])
def test_forward_mode(dual):
    results = []
    for model in pair(OneLinear(), r=3):
        x = torch.linspace(-1, 1, 120, dtype=torch.float64).view(20, 6)
        with forward_ad.dual_level():
            if dual == "x":
                x = forward_ad.make_dual(x, x.cos())
            else:
                module = inner_module(model, dual)
                tangent = module.weight.detach().cos()
                primal = module._parameters.pop("weight")
                module.weight = forward_ad.make_dual(primal, tangent)
            results.append(dict(zip("yt", forward_ad.unpack_dual(model(x)), strict=True)))
    assert_same(results[1], results[0])


@pytest.fixture
def graphs():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def is_merged(graph):
    return any(node.target is torch._functorch.autograd_function.autograd_function_apply for node in graph.graph.nodes)


@pytest.mark.slow
def test_compiled_with_a_dynamic_batch_is_two_graphs(graphs):
    """One for the first size, one for all others; the rule of when merging pays is no guard."""
    theirs, ours = pair(OneLinear(32, 32), r=3)
    compiled = torch.compile(ours, backend=graphs, fullgraph=True)
    for size in (64, 40, 20, 33, 8, 2):
        x = torch.randn(size, 32, dtype=torch.float64)
        found = {k.removeprefix("_orig_mod."): v for k, v in outcome(compiled, x).items()}
        assert_same(found, outcome(theirs, x))
    assert graphs.frame_count == 2 and all(map(is_merged, graphs.graphs))


def test_compiled_with_few_tokens_is_pefts_forward(graphs):
    _, ours = pair(OneLinear(32, 32), r=3)
    torch.compile(ours, backend=graphs, fullgraph=True)(torch.randn(3, 32, dtype=torch.float64))
    assert not is_merged(graphs.graphs[0])


@pytest.mark.slow
def test_compiled_gradient_of_torch_func(graphs):
    x = torch.randn(20, 6, dtype=torch.float64)
    results = []
    for model in pair(OneLinear(), r=3):
        gradient = torch.func.grad(lambda p, m=model: functional_call(m, p, (x,)).square().sum())
        results.append(torch.compile(gradient, backend=graphs, fullgraph=True)(parameters_of(model)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("strict", [False, True])
def test_exported_with_a_dynamic_batch(strict):
    theirs, ours = pair(OneLinear(32, 32), r=3)
    shapes = {"args": ({0: torch.export.Dim("batch", min=2, max=1024)},)}
    exported = torch.export.export(
        ours, (torch.randn(64, 32, dtype=torch.float64),), dynamic_shapes=shapes, strict=strict
    ).module()
    for size in (2, 31, 100):
        x = torch.randn(size, 32, dtype=torch.float64)
        torch.testing.assert_close(exported(x), theirs(x), **TIGHT)


@pytest.mark.filterwarnings("ignore")
def test_traced_and_saved(tmp_path):
    theirs, ours = pair(OneLinear(), r=3)
    x = torch.randn(20, 6, dtype=torch.float64)
    torch.jit.trace(ours, x).save(tmp_path / "traced.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), theirs(x), **TIGHT)


@pytest.mark.parametrize("trainable", [False, True])
def test_scaling_held_as_a_tensor(graphs, trainable):
    """As peft's compiled hotswap holds it, and as whoever learns it."""
    theirs, ours = pair(OneLinear(), r=3, lora_alpha=7)
    x, results = torch.randn(20, 6, dtype=torch.float64), []
    for model in (theirs, ours):
        prepare_model_for_compiled_hotswap(model)
        scaling = model.base_model.model.layer.scaling
        scaling["default"].requires_grad_(trainable)
        results.append(outcome(model, x) | ({"scaling": scaling["default"].grad} if trainable else {}))
        scaling["default"].grad = None
    assert_same(results[1], results[0])
    found = outcome(torch.compile(ours, backend=graphs, fullgraph=True), x)
    assert_same(
        {k.removeprefix("_orig_mod."): v for k, v in found.items()} | {"scaling": 0}, results[0] | {"scaling": 0}
    )
    assert graphs.frame_count == 1


# What else a model may go through


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_run_merged(calls, how, tmp_path):
    theirs, ours = pair(OneLinear(), r=3)
    if how == "save":
        torch.save(ours, tmp_path / "model.pt")
    twin = {
        "deepcopy": lambda: copy.deepcopy(ours),
        "pickle": lambda: pickle.loads(pickle.dumps(ours)),
        "save": lambda: torch.load(tmp_path / "model.pt", weights_only=False),  # of our own making
    }[how]()
    x = torch.randn(20, 6, dtype=torch.float64)
    assert_same(outcome(twin, x), outcome(theirs, x))
    assert calls


def test_inference_mode_and_strided_inputs(calls):
    theirs, ours = pair(OneLinear(), r=3)
    wide = torch.randn(6, 40, dtype=torch.float64)
    for x in (wide.T, wide.T[::2], torch.randn(6, dtype=torch.float64).expand(20, 6)):
        with torch.inference_mode():
            torch.testing.assert_close(ours(x.clone()), theirs(x), **TIGHT)
        assert_same(outcome(ours, x), outcome(theirs, x))
    assert len(calls) == 6


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6)])
def test_no_tokens(shape):
    theirs, ours = pair(OneLinear(), r=3)
    assert_same(outcome(ours, torch.empty(shape).double()), outcome(theirs, torch.empty(shape).double()))


def test_base_weight_that_is_trained_too(calls):
    models = pair(OneLinear(), r=3)
    for model in models:
        inner_module(model, "base_layer").requires_grad_(True)
    theirs, ours = (outcome(m, torch.ones(20, 6, dtype=torch.float64)) for m in models)
    assert_same(ours, theirs)
    assert not calls and any(name.endswith("base_layer.weight") for name in ours)


# Which layers are ours


def test_only_plain_linear_layers_are_replaced():
    class Quantised(nn.Linear):
        pass

    config = LoraConfig(r=2, target_modules=["layer"])
    assert merged_linear_factory(Quantised(4, 4), "default", config, r=2, lora_alpha=2) is None
    assert merged_linear_factory(nn.Conv2d(4, 4, 1), "default", config, r=2, lora_alpha=2) is None


def test_fan_in_fan_out_is_set_off_as_by_peft(calls):
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to False"):
        theirs, ours = pair(OneLinear(), r=3, fan_in_fan_out=True)
    assert ours.peft_config["default"].fan_in_fan_out is False
    x = torch.randn(20, 6, dtype=torch.float64)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    assert calls
    ours.merge_adapter()
    torch.testing.assert_close(ours(x), expected, **TIGHT)


def test_target_parameters_are_pefts_own():
    results = []
    for ours in (False, True):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=[], target_parameters=["layer.weight"], init_lora_weights=False)
        if ours:
            config._register_custom_module({nn.Linear: merged_linear_factory})
        model = get_peft_model(OneLinear(), config, autocast_adapter_dtype=False)
        assert type(model.base_model.model.layer) is ParamWrapper
        results.append(outcome(model, torch.ones(20, 6, dtype=torch.float64)))
    assert_same(results[1], results[0])


# q and v alone: the weight is the one truth


def block_pair(x):
    """A fused qkv (6, 18) adapted in q and v, with peft's layer and with ours."""
    models = pair(OneLinear(6, 18), r=4)
    for model in models:
        b = inner_module(model, "lora_B")
        b.weight.data[6:12], b.weight.data[:6, 2:], b.weight.data[12:, :2] = 0, 0, 0
    return models, models[0](x)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("rank", [2, 4, 8])
def test_adapter_of_q_k_and_v_swapped_into_the_place_of_q_and_v(tmp_path, merged, rank):
    x = torch.randn(20, 6, dtype=torch.float64)
    (stock, ours), _ = block_pair(x)
    model = ours if merged else stock
    restrict_to_blocks(model, "default", ["layer"])
    torch.manual_seed(9)
    config = LoraConfig(target_modules=["layer"], r=rank, init_lora_weights=False)
    full = get_peft_model(copy.deepcopy(model.unload()), config, autocast_adapter_dtype=False)
    (model,) = [m for m, b in zip(block_pair(x)[0], (False, True), strict=True) if b is merged]
    model.load_state_dict({k: v for k, v in full.state_dict().items() if "base_layer" in k}, strict=False)
    restrict_to_blocks(model, "default", ["layer"])
    full.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")

    layer, expected = model.base_model.model.layer, full(x)
    torch.testing.assert_close(model(x), expected, **TIGHT)
    delta = full.base_model.model.layer.get_delta_weight("default")
    torch.testing.assert_close(layer.get_delta_weight("default"), delta, **TIGHT)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, **TIGHT)


def test_only_the_blocks_are_trained(calls):
    x = torch.randn(20, 6, dtype=torch.float64)
    models, expected = block_pair(x)
    results = []
    for model in models:
        restrict_to_blocks(model, "default", ["layer"])
        results.append(outcome(model, x))
        torch.testing.assert_close(results[-1]["output"], expected, **TIGHT)
    assert_same(results[1], results[0])
    gradient = next(v for k, v in results[1].items() if "lora_B" in k)
    assert gradient[:6, :2].all() and gradient[12:, 2:].all()
    assert not gradient[6:12].any() and not gradient[:6, 2:].any() and not gradient[12:, :2].any()
    assert calls and isinstance(inner_module(models[1], "lora_B"), BlockLinear)


def test_adapter_of_k_is_not_made_one_of_q_and_v():
    _, ours = pair(OneLinear(6, 18), r=4)
    with pytest.raises(ValueError, match="outside its two blocks"):
        restrict_to_blocks(ours, "default", ["layer"])


def test_blocks_compiled_whole():
    models, expected = block_pair(torch.randn(20, 6, dtype=torch.float64))
    x = torch.randn(20, 6, dtype=torch.float64)
    for model in models:
        restrict_to_blocks(model, "default", ["layer"])
    compiled = torch.compile(models[1], backend="aot_eager", fullgraph=True)
    found = {k.removeprefix("_orig_mod."): v for k, v in outcome(compiled, x).items()}
    assert_same(found, outcome(models[0], x))


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
