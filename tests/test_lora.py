"""add_lora: where it sits, what it refuses, and that peft's own tools understand the result."""

import copy
import pickle

import pytest
import timm
import torch
from conftest import SIDE, build_vit, images, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from abm_vision import Backbone, add_lora, check_adapters, find_backbone, register_backbone
from abm_vision.abm.merged_linear import MergedLinear

LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def adapted(model):
    """Names of the adapted layers."""
    return [n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)]


def train_steps(model, steps=5, lr=0.05):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.1)
    for step in range(steps):
        model(images(seed=step)).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    return model


def b_of(model, layer, adapter="default"):
    return model.get_base_model().get_submodule(layer).lora_B[adapter].weight


# Where it sits


def test_every_projection_of_every_block_and_nothing_else(vit):
    model = add_lora(vit)
    assert adapted(model) == [f"blocks.{i}.{n}" for i in range(6) for n in LINEARS]
    trainable = {n.split("base_model.model.")[1] for n, p in model.named_parameters() if p.requires_grad}
    heads = {f"head.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    assert trainable == heads | {f"{n}.lora_{ab}.default.weight" for n in adapted(model) for ab in "AB"}


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("attention", ("attn.qkv", "attn.proj")),
        ("mlp", ("mlp.fc1", "mlp.fc2")),
        (["attn.qkv", "fc2"], ("attn.qkv", "mlp.fc2")),
        (["proj"], ("attn.proj",)),  # never patch_embed.proj, which stock peft adapts too
        (["blocks.2.mlp.fc1"], None),
    ],
)
def test_targets(vit, targets, expected):
    found = adapted(add_lora(vit, targets=targets))
    assert found == ([f"blocks.{i}.{n}" for i in range(6) for n in expected] if expected else targets)


def test_starts_as_the_model_itself(vit):
    expected = vit(images())
    assert torch.equal(add_lora(vit)(images()), expected)


def test_a_equals_stock_pefts_from_the_same_seed(vit):
    stock = copy.deepcopy(vit)
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=list(LINEARS), modules_to_save=["head"])
    stock = get_peft_model(stock, config)
    torch.manual_seed(3)
    model = add_lora(vit, rank=4, alpha=4)
    for (name, ours), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@settings(max_examples=8)
@given(rank=st.integers(1, 64), alpha=st.floats(0.5, 64), rslora=st.booleans())
def test_rank_and_scaling(rank, alpha, rslora):
    model = add_lora(build_vit(depth=1), rank, alpha, rslora=rslora)
    for name in adapted(model):
        layer = model.get_base_model().get_submodule(name)
        assert layer.lora_A["default"].weight.shape == (rank, layer.in_features)
        assert layer.scaling["default"] == pytest.approx(alpha / rank**0.5 if rslora else alpha / rank)


def test_rank_and_alpha_patterns(vit):
    model = add_lora(vit, 4, 8, rank_pattern={"attn.qkv": 2, r"blocks\.[01]\.mlp.fc1": 6}, alpha_pattern={"fc2": 1})
    layers = {n: model.get_base_model().get_submodule(n) for n in adapted(model)}
    assert layers["blocks.3.attn.qkv"].r["default"] == 2
    assert [layers[f"blocks.{i}.mlp.fc1"].r["default"] for i in range(3)] == [6, 6, 4]
    assert layers["blocks.0.mlp.fc2"].scaling["default"] == 1 / 4
    assert layers["blocks.0.mlp.fc1"].scaling["default"] == 8 / 6


def test_options_reach_peft(vit):
    model = add_lora(vit, dropout=0.25, dora=True, modules_to_save=["norm"])
    layer = model.get_base_model().blocks[0].mlp.fc1
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.use_dora["default"] is True
    assert model.peft_config["default"].modules_to_save == ["norm"]
    train_steps(model)


@pytest.mark.parametrize("merged", [True, False])
def test_merged_linear_can_be_switched_off(vit, merged):
    model = add_lora(vit, merged_linear=merged)
    assert isinstance(model.get_base_model().blocks[0].mlp.fc1, MergedLinear) is merged


def test_distilled_model_has_two_heads():
    model = add_lora(build_vit("deit_tiny_distilled_patch16_224", depth=1))
    assert model.peft_config["default"].modules_to_save == ["head", "head_dist"]


def test_model_without_a_head():
    model = add_lora(build_vit(num_classes=0))
    assert model.peft_config["default"].modules_to_save == []
    train_steps(model)


# q and v alone, inside a fused qkv


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("merged", [False, True])
def test_qv_equals_two_adapters_of_rank_r(vit, rslora, merged):
    """Against the definition: q and v each get s B A of rank r, k gets nothing."""
    model = randomise(add_lora(vit, 4, 6, targets=["attn.qkv"], qkv="qv", rslora=rslora, merged_linear=merged))
    layer = model.get_base_model().blocks[1].attn.qkv
    a, b, width = layer.lora_A["default"].weight, layer.lora_B["default"].weight, 64
    assert a.shape == (8, width) and b.shape == (3 * width, 8)
    scaling = 6 / 4**0.5 if rslora else 6 / 4
    x = torch.randn(40, width)
    q, k, v = layer(x).sub(layer.base_layer(x)).split(width, -1)
    torch.testing.assert_close(q, scaling * x @ a[:4].T @ b[:width, :4].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(v, scaling * x @ a[4:].T @ b[2 * width :, 4:].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(k, torch.zeros_like(k), rtol=0, atol=1e-5)


def test_k_stays_zero_through_training_and_copying(vit):
    model = train_steps(add_lora(vit, 4, qkv="qv"))
    for trained in (model, train_steps(copy.deepcopy(model)), train_steps(pickle.loads(pickle.dumps(model)))):
        for i in range(6):
            b = b_of(trained, f"blocks.{i}.attn.qkv")
            assert b[:64, :4].any() and b[128:, 4:].any()
            assert not b[64:128].any() and not b[:64, 4:].any() and not b[128:, :4].any()


def test_qv_with_separate_projections_leaves_out_k():
    model = add_lora(build_vit("eva02_base_patch14_224", img_size=28, depth=1, embed_dim=48, num_heads=2), 2, qkv="qv")
    kinds = {n.rpartition(".")[2] for n in adapted(model)}
    assert {"q_proj", "v_proj"} <= kinds and "k_proj" not in kinds


def test_qv_where_keys_are_mixed_in_is_refused():
    model = timm.create_model("davit_tiny")
    with pytest.raises(ValueError, match=r'mixes keys in otherwise. Use qkv="full"'):
        add_lora(model, qkv="qv")


# What stock peft does to timm's users in silence


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "beitv2_base_patch16_224", "eva02_tiny_patch14_224"])
def test_fused_qkv_that_the_block_reads_itself_gets_gradients(name):
    size = {"img_size": 28} if "eva" in name else {"img_size": 32}
    model = build_vit(name, depth=1, embed_dim=48, num_heads=2, **size).eval()
    x = images(2, size["img_size"])
    expected = model(x)
    stock = copy.deepcopy(model)
    stock = get_peft_model(stock, LoraConfig(target_modules=["qkv"]))
    assert not stock(x).requires_grad  # what is put right here
    with pytest.raises(ValueError, match=r"1 of 1 adapters received no gradient: blocks\.0\.attn\.qkv \(default\)\."):
        check_adapters(stock, x)
    model = add_lora(model)
    torch.testing.assert_close(model(x), expected)
    check_adapters(model, x)


def test_swinv2_too():
    options = {"window_size": 8, "embed_dim": 24, "depths": (1,), "num_heads": (2,)}
    model = build_vit("swinv2_tiny_window8_256", img_size=32, **options).eval()
    expected = model(images())
    model = add_lora(model)
    torch.testing.assert_close(model(images()), expected)
    check_adapters(model, images())


def test_head_reset_after_wrapping_fails_at_save_and_at_check(vit, tmp_path):
    model = add_lora(vit)
    model.get_base_model().reset_classifier(7)
    for action in (lambda: model.save_pretrained(tmp_path / "a"), lambda: check_adapters(model, images())):
        with pytest.raises(ValueError, match="'head' was replaced after LoRA was added"):
            action()


def test_check_adapters_leaves_nothing_behind():
    model = add_lora(build_vit(drop_path_rate=0.9)).train()
    model.get_base_model().blocks[1].eval()
    modes = [m.training for m in model.modules()]
    gradient = torch.ones_like(model.get_base_model().head.weight)
    model.get_base_model().head.modules_to_save["default"].weight.grad = gradient
    state = torch.get_rng_state()
    check_adapters(model, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(kept) == 1 and kept[0] is gradient


def test_check_adapters_names_a_layer_that_nobody_calls(vit):
    model = add_lora(vit)
    block = model.get_base_model().blocks[4]
    block.mlp.forward = lambda x: x
    with pytest.raises(
        ValueError, match=r"2 of 24 .* blocks\.4\.mlp\.fc1 \(default\), blocks\.4\.mlp\.fc2 \(default\)\. The"
    ):
        check_adapters(model, images())


def test_check_adapters_sees_one_of_two_active_adapters_fail():
    model = add_lora(add_lora(build_vit(num_classes=0)), adapter_name="second", targets="mlp")
    model.base_model.set_adapter(["default", "second"])
    check_adapters(model, images())
    model.set_requires_grad("default", False)  # frozen, as a reference is
    check_adapters(model, images())
    model.set_requires_grad("default", True)
    layer = model.get_base_model().blocks[3].mlp.fc1
    layer.lora_B["second"].register_forward_hook(lambda m, a, out: out.detach())
    with pytest.raises(ValueError, match=r"1 of 36 adapters received no gradient: blocks\.3\.mlp\.fc1 \(second\)"):
        check_adapters(model, images())


def test_check_adapters_takes_a_head_that_starts_at_zero(vit):
    nn.init.zeros_(vit.head.weight)
    model = add_lora(vit)
    check_adapters(model, images())
    assert not model.get_base_model().head.modules_to_save["default"].weight.any()


def test_check_adapters_on_a_frozen_adapter(vit):
    model = add_lora(vit).requires_grad_(False)
    with pytest.raises(ValueError, match="is_trainable=True"):
        check_adapters(model, images())


# Several adapters


def test_second_adapter_by_name(vit):
    model = randomise(add_lora(vit, 4, qkv="qv"))
    before = model(images())
    add_lora(model, 2, targets="mlp", adapter_name="second")
    assert list(model.peft_config) == ["default", "second"]
    torch.testing.assert_close(model(images()), before)
    model.set_adapter("second")
    train_steps(model)
    model.set_adapter("default")
    torch.testing.assert_close(model(images()), before)
    assert not b_of(model, "blocks.0.attn.qkv")[64:128].any()


def test_second_add_lora_of_the_same_name_is_refused_with_the_reason(vit):
    model = add_lora(vit)
    with pytest.raises(ValueError, match="already has an adapter named 'default'.*adapter_name"):
        add_lora(model)
    with pytest.raises(ValueError, match="contains LoRA layers but is no PeftModel"):
        add_lora(model.get_base_model())


def test_compiled_model_is_refused(vit):
    with pytest.raises(ValueError, match=r"is compiled: call torch.compile last"):
        add_lora(torch.compile(vit, backend="eager"))


# Merging


@pytest.mark.parametrize(
    "targets, options",
    [
        (targets, options)
        for targets in ("all", "attention", "mlp", ["attn.qkv"])
        for options in ({}, {"rslora": True}, {"dora": True}, {"qkv": "qv"})
        if targets != "mlp" or "qkv" not in options  # q and v are no part of the MLP
    ],
)
def test_merge_and_unload_equals_the_adapted_model(targets, options):
    model = build_vit()
    keys = list(model.state_dict())
    model = randomise(add_lora(model, 4, targets=targets, **options)).eval()
    expected = model(images())
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == keys and not isinstance(merged, PeftModel)
    torch.testing.assert_close(merged(images()), expected, rtol=1e-4, atol=1e-5)


# Bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of 1 or more"),
        ({"rank": 65}, r"rank 65 for .* 1 \.\. 64"),
        ({"rank": 40, "qkv": "qv", "targets": "mlp"}, "hold no attention input projection"),
        ({"rank_pattern": {"fc1": 100}}, r"rank 100 for blocks\.0\.mlp\.fc1"),
        ({"rank_pattern": {"fc3": 2}}, "rank_pattern key 'fc3' matches none of the 24 adapted layers"),
        ({"alpha_pattern": {"head": 2}}, "alpha_pattern key 'head' matches none"),
        ({"targets": "every"}, "targets is 'every'; allowed are 'all', 'attention', 'mlp', or a list"),
        ({"targets": []}, "targets is empty"),
        ({"targets": ["head"]}, "'head' matches no projection inside a block; there are: attn.proj, attn.qkv, mlp.fc1"),
        ({"targets": ["patch_embed.proj"]}, "matches no projection inside a block"),
        ({"qkv": "kv"}, "qkv is 'kv'; allowed are 'full', 'qv'"),
        ({"qkv": "qv", "dora": True}, 'use qkv="full" with dora=True'),
        ({"alpha": 0}, "alpha is 0; it must be a finite number above 0"),
        (
            {"alpha_pattern": {"fc1": float("nan")}},
            r"alpha_pattern\['fc1'\] is nan; it must be a finite number above 0",
        ),
        ({"dropout": 1.0}, r"dropout is 1\.0; it must lie in \[0, 1\)"),
    ],
)
def test_bad_arguments(vit, options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(vit, **options)
    assert not any(isinstance(m, LoraLayer) for m in vit.modules())


def test_unknown_model_says_what_to_pass():
    with pytest.raises(
        ValueError, match=r"Sequential is no supported model .*timm vision transformer.*Pass backbone=Backbone"
    ):
        add_lora(nn.Sequential(nn.Linear(2, 2)))


def test_a_record_that_is_none():
    with pytest.raises(ValueError, match="the backbone is None; it must be a Backbone"):
        register_backbone(None)


def test_convolutional_model_is_refused_by_name():
    with pytest.raises(ValueError, match=r"ResNet has no blocks of attention and MLP"):
        add_lora(timm.create_model("resnet10t"))


def test_a_model_of_ones_own_with_its_record():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.up, self.act, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

        def forward(self, x):
            return x + self.down(self.act(self.up(x + self.mix(x))))

    record = Backbone(
        name="own",
        matches=lambda m: isinstance(m, nn.Sequential),
        target_modules={"attention": r"\d+\.mix", "mlp": r"\d+\.(up|down)"},
        boundary_modules={"blocks": r"\d+\.act"},
        forward_fn=lambda m, batch: m(batch),
        loss_fn=lambda m, batch: m(batch).square().mean(),
    )
    model = add_lora(nn.Sequential(Block(), Block()), rank=2, backbone=record)
    assert adapted(model) == [f"{i}.{n}" for i in range(2) for n in ("mix", "up", "down")]
    check_adapters(model, torch.randn(20, 4), backbone=record)


def test_backbone_is_found_through_peft(vit):
    assert find_backbone(add_lora(vit)).name == find_backbone(build_vit()).name == "timm vision transformer"
    assert SIDE == 32
