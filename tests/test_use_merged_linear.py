"""Any model's LoRA layers made ours in place: values and gradients of stock peft, each reason, and the way back."""

import copy
import functools
import warnings

import pytest
import torch
from conftest import build_vit, images
from peft import LoHaConfig, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from torch import nn
from torch.nn.functional import cross_entropy

from abm_vision import use_merged_linear
from abm_vision.abm import merged_linear
from abm_vision.abm.merged_linear import MergedLinear


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the merged product ran."""
    count = []
    original = merged_linear._MergedLoRA.apply
    monkeypatch.setattr(merged_linear._MergedLoRA, "apply", lambda *a: count.append(1) or original(*a))
    return count


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 5))


def bert():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **shape, **quiet))


def llama():
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **shape))


TOKENS = torch.arange(3, 39).view(3, 12)
MODELS = {  # how it is built, what is adapted, how many layers that is, its loss
    "mlp": (mlp, ["0", "2"], 2, lambda m: m(torch.linspace(-1, 1, 120).view(20, 6).double()).square().sum()),
    "timm": (build_vit, ["qkv", "fc1"], 12, lambda m: cross_entropy(m(images(16).double()), torch.arange(16) % 5)),
    "bert": (bert, None, 4, lambda m: m(input_ids=TOKENS, labels=torch.tensor([0, 1, 0])).loss),
    "llama": (llama, "all-linear", 14, lambda m: m(input_ids=TOKENS, labels=TOKENS).loss),
}


def adapted(base, **options):
    torch.manual_seed(1)
    config = LoraConfig(**{"init_lora_weights": False, "r": 3, "lora_alpha": 5, **options})
    return get_peft_model(base, config, autocast_adapter_dtype=False)


def train(model, loss_of, optimiser, steps=3):
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_training_that_changes_layer_on_the_way_is_that_of_stock_peft(calls, name):
    """Steps as peft's layer, then as ours, then as peft's, with the optimiser that was made first."""
    build, targets, count, loss_of = MODELS[name]
    torch.manual_seed(0)
    stock = adapted(build().double(), target_modules=targets)
    ours = copy.deepcopy(stock)
    expected = train(stock, loss_of, adam(stock), 9)

    keys, parameters, optimiser = list(ours.state_dict()), list(ours.parameters()), adam(ours)
    losses = train(ours, loss_of, optimiser)
    assert not calls and use_merged_linear(ours) == count and use_merged_linear(ours) == 0
    losses += train(ours, loss_of, optimiser)
    assert len(calls) >= 3
    assert all(a is b for a, b in zip(ours.parameters(), parameters, strict=True)) and list(ours.state_dict()) == keys
    assert use_merged_linear(ours, False) == count and use_merged_linear(ours, False) == 0
    calls.clear()
    losses += train(ours, loss_of, optimiser)
    assert not calls
    assert losses == pytest.approx(expected, rel=1e-9) and losses[-1] != losses[0]
    for (key, value), other in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.004)]
)
def test_output_and_gradients_in_every_dtype(calls, dtype, tolerance):
    """Against float64, written out: y = x W^T + b + s x A^T B^T."""
    model = adapted(nn.Sequential(nn.Linear(6, 9)), target_modules=["0"]).to(dtype)
    use_merged_linear(model)
    layer = model.base_model.model[0]
    w, b, a, bb = (
        t.detach().double().requires_grad_()
        for t in (
            layer.base_layer.weight,
            layer.base_layer.bias,
            layer.lora_A.default.weight,
            layer.lora_B.default.weight,
        )
    )
    x = torch.randn(20, 6).to(dtype).requires_grad_()
    z = x.detach().double().requires_grad_()
    expected = z @ w.T + b + 5 / 3 * (z @ a.T) @ bb.T
    expected.sum().backward()
    found = model(x)
    found.sum().backward()
    assert calls and found.dtype == dtype
    pairs = [(found, expected), (x.grad, z.grad), (layer.lora_A.default.weight.grad, a.grad)]
    for ours, truth in [*pairs, (layer.lora_B.default.weight.grad, bb.grad)]:
        assert (ours.double() - truth).norm() < tolerance * truth.norm()


class Parts(nn.Module):
    """A linear layer and one of each kind that stays peft's."""

    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(7, 6), nn.Conv1d(6, 6, 1)
        self.linear, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2)

    def forward(self, ids):
        x = self.conv(self.words(ids).transpose(1, 2)).transpose(1, 2)
        return self.attention(x, x, x)[0] + self.linear(x)


def inner(model):
    return model.base_model.model[0]


def quantise(model):
    inner(model).base_layer.weight = nn.Parameter(torch.zeros(12, 6, dtype=torch.int8), requires_grad=False)


def replace_forward(model):
    inner(model).forward = functools.partial(type(inner(model)).forward, inner(model))  # as accelerate does


REASONS = {  # options of LoRA, what is done to the model, the reason
    "dropout": ({"lora_dropout": 0.1}, None, "with LoRA dropout"),
    "dora": ({"use_dora": True}, None, "with Dora"),
    "lora_bias": ({"lora_bias": True}, None, "with a bias in LoRA"),
    "inner_hook": ({}, lambda m: inner(m).lora_A.default.register_forward_hook(lambda *_: None), "with hooks"),
    "base_hook": ({}, lambda m: inner(m).base_layer.register_forward_hook(lambda *_: None), "with hooks"),
    "replaced": ({}, replace_forward, "with a replaced forward"),
    "trained": ({}, lambda m: inner(m).base_layer.requires_grad_(True), "with a base weight that is trained"),
    "quantised": ({}, quantise, "quantised or sharded .Parameter, torch.int8"),
    "hotswap": ({}, prepare_model_for_compiled_hotswap, "with a scaling held as a tensor"),
    "other_base": (
        {},
        lambda m: setattr(inner(m), "base_layer", nn.Sequential(inner(m).base_layer)),
        r"around a torch\S+Sequential",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_layer_left_alone_says_why_and_would_have_run_pefts_forward(calls, case):
    options, change, reason = REASONS[case]
    model = adapted(nn.Sequential(nn.Linear(6, 12)), target_modules=["0"], **options).train()
    if change:
        change(model)
    before = type(inner(model))
    with pytest.warns(
        UserWarning, match=rf"^1 of 1 LoRA layers are left as they are: 1 .*{reason}.*base_model.model.0"
    ):
        assert use_merged_linear(model) == 0
    assert type(inner(model)) is before
    if case != "quantised":
        inner(model).__class__ = MergedLinear  # the reason is true
        model(torch.ones(40, 6))
        assert not calls


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"bias": "all"}, {"lora_dropout": 0.0}])
def test_what_is_no_obstacle(calls, options):
    model = adapted(mlp(), target_modules=["0", "2"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert use_merged_linear(model) == 2
    model(torch.ones(40, 6))
    assert len(calls) == 2


def test_other_kinds_of_layer():
    model = adapted(Parts(), target_modules=["words", "conv", "linear", "attention"], init_lora_weights=True)
    ids = torch.arange(6).view(2, 3)
    expected = model(ids)
    with pytest.warns(UserWarning, match=r"^4 of 5") as caught:
        assert use_merged_linear(model) == 1
    for reason in (
        "1 of class Embedding",
        "1 of class Conv1d",
        "1 of class MultiheadAttention",
        "NonDynamicallyQuantizableLinear",
    ):
        assert reason in str(caught[0].message)
    torch.testing.assert_close(model(ids), expected)


def test_several_adapters(calls):
    """A layer is changed if one of its adapters can run merged; the others run as peft's."""
    stock = adapted(mlp(), target_modules=["0"])
    stock.add_adapter("dora", LoraConfig(target_modules=["0", "2"], use_dora=True, init_lora_weights=False))
    ours, x = copy.deepcopy(stock), torch.randn(40, 6)
    with pytest.warns(UserWarning, match=r"^1 of 2 .*1 with Dora .such as base_model.model.2"):
        assert use_merged_linear(ours) == 1
    for active, merged in (("default", 1), ("dora", 0), (["default", "dora"], 0)):
        calls.clear()
        for model in (stock, ours):
            model.base_model.set_adapter(active)
        torch.testing.assert_close(ours(x), stock(x))
        assert len(calls) == merged


def test_adapter_of_further_layers_added_later():
    model = adapted(mlp(), target_modules=["0"])
    assert use_merged_linear(model) == 1
    model.add_adapter("second", LoraConfig(target_modules=["0", "2"]))
    assert use_merged_linear(model) == 1


def test_merged_while_changed(calls):
    model, x = adapted(mlp(), target_modules=["0", "2"]), torch.randn(40, 6)
    expected = model(x)
    model.merge_adapter()
    assert use_merged_linear(model) == 2
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)
    assert len(calls) == 2
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_hooks_on_the_layer_are_kept(calls):
    model, seen = adapted(mlp(), target_modules=["0"]), []
    inner(model).register_forward_hook(lambda module, given, output: seen.append(output) or 2 * output)
    x = torch.randn(40, 6)
    expected = model(x)
    assert use_merged_linear(model) == 1
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 2 and calls


def test_compiled_before_is_compiled_again():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    graphs, x = CompileCounterWithBackend("eager"), torch.randn(40, 6)
    model = torch.compile(adapted(mlp(), target_modules=["0"]), backend=graphs)
    expected = model(x)
    assert use_merged_linear(model) == 1
    torch.testing.assert_close(model(x), expected)
    assert graphs.frame_count == 2
    torch._dynamo.reset()


def test_a_copy_and_the_files_are_what_they_would_be(calls, tmp_path):
    base, x = mlp(), torch.randn(40, 6)
    model = adapted(copy.deepcopy(base), target_modules=["0", "2"])
    use_merged_linear(model)
    assert [type(m) for m in copy.deepcopy(model).modules() if isinstance(m, LoraLayer)] == [MergedLinear] * 2
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert not any(isinstance(m, MergedLinear) for m in loaded.modules())
    torch.testing.assert_close(loaded(x), model(x))


def test_forward_replaced_after_the_change_is_not_undone():
    model = adapted(mlp(), target_modules=["0"])
    use_merged_linear(model)
    replace_forward(model)
    with pytest.warns(UserWarning, match="1 with a replaced forward"):
        assert use_merged_linear(model, False) == 0
    model(torch.ones(40, 6))


def test_models_without_a_wrapper_and_of_mixed_adapters(calls):
    """What `add_adapter` of transformers and diffusers makes; and LoRA around LoHa, which stays."""
    model = inject_adapter_in_model(LoraConfig(target_modules=["0", "2"]), mlp())
    assert use_merged_linear(model) == 2
    mixed = get_peft_model(mlp(), LoHaConfig(target_modules=["0"]), mixed=True)
    mixed.add_adapter("lora", LoraConfig(target_modules=["0", "2"], init_lora_weights=False))
    mixed.set_adapter(["default", "lora"])
    x = torch.randn(40, 6)
    expected = mixed(x)
    with pytest.warns(UserWarning, match=r"1 around a peft.tuners.loha.layer.Linear"):
        assert use_merged_linear(mixed) == 1
    torch.testing.assert_close(mixed(x), expected)


def test_refusals():
    with pytest.raises(ValueError, match="Sequential has no LoRA layer: call get_peft_model"):
        use_merged_linear(mlp())
    with pytest.raises(ValueError, match="the model is 'adapter'; it must be a torch.nn.Module"):
        use_merged_linear("adapter")
    prompt = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="has no LoRA layer"):
        use_merged_linear(prompt)
