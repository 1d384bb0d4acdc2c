"""What an adapter may be asked to do: bases that two need, names that wrappers change, arguments, precision."""

import json
import threading

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import build_vit, images, randomise
from helpers import FAST, fast, small_vit, trained
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from abm_vision import (
    ABMConfig,
    AlignConfig,
    add_lora,
    check_adapters,
    information_loss,
    initialize_lora,
    initialize_lora_abm_weights,
    load_adapter,
    save_adapter,
)
from abm_vision.vit import VIT

X, Y = images(8), torch.arange(8) % 5
BATCHES = [(X, Y)]
CHANGING = ["pissa", "olora", "corda", "lora_ga"]


def adapted(seed=1, **options):
    torch.manual_seed(seed)
    return add_lora(small_vit(), rank=4, alpha=6, **options)


def initialised(name, **options):
    model = adapted(**options)
    initialize_lora(model, name, BATCHES, config=fast(name), show_progress_bar=False)
    return model


# One base, two needs


@pytest.mark.parametrize("name", CHANGING)
def test_no_second_adapter_on_a_base_that_the_first_has_changed(name, tmp_path):
    save_adapter(randomise(adapted()), tmp_path)
    model = initialised(name)
    with pytest.raises(ValueError, match="adapter 'default' has changed the base weights"):
        add_lora(model, adapter_name="second")
    with pytest.raises(ValueError, match="adapter 'default' has changed the base weights"):
        load_adapter(model, tmp_path, adapter_name="second")
    assert list(model.peft_config) == ["default"]


def test_the_base_stays_changed_when_the_adapter_is_gone(tmp_path):
    model = initialised("pissa")
    with pytest.raises(ValueError, match="has changed the base weights"):
        add_lora(model, adapter_name="second")
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default' has changed the base weights"):
        add_lora(model, adapter_name="second")


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["pissa", "lora_ga"])
def test_a_state_dict_and_what_was_taken_out_of_its_base_belong_together(name, strict, tmp_path):
    model = trained(initialised(name), X, Y)
    for fresh in (adapted(2), initialised("gaussian")):
        with pytest.raises(
            ValueError, match="was changed by the initialisation of its adapter, the model's is unchanged"
        ):
            fresh.load_state_dict(model.state_dict(), strict=strict)
    with pytest.raises(ValueError, match="is unchanged, the model's was changed"):
        model.load_state_dict(adapted().state_dict(), strict=strict)
    resumed = initialised(name)
    resumed.load_state_dict(model.state_dict(), strict=strict)
    save_adapter(resumed, tmp_path)
    stock = PeftModel.from_pretrained(small_vit(), tmp_path).eval()
    torch.testing.assert_close(stock(X), model(X), rtol=0, atol=1e-4)


# Names that change inside a model


@pytest.mark.parametrize("part", ["blocks.1", "blocks.0.attn.qkv", "head", ""])
def test_compiled_parts_are_saved_under_their_own_names(part, tmp_path):
    model = randomise(adapted())
    expected = model.eval()(X)
    if part:
        parent, _, leaf = f"base_model.model.{part}".rpartition(".")
        setattr(
            model.get_submodule(parent), leaf, torch.compile(model.get_submodule(f"{parent}.{leaf}"), backend="eager")
        )
    save_adapter(model if part else torch.compile(model, backend="eager"), tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "_orig_mod" in name]
    torch.testing.assert_close(PeftModel.from_pretrained(small_vit(), tmp_path).eval()(X), expected)
    torch.testing.assert_close(model(X), expected)
    assert not part or any("_orig_mod" in name for name, _ in model.named_modules())


def test_a_compiled_part_takes_no_adapter(tmp_path):
    save_adapter(adapted(), tmp_path)
    for wrap in (lambda m: torch.compile(m, backend="eager"), lambda m: (m.compile(backend="eager"), m)[1]):
        model = small_vit()
        model.blocks[1] = wrap(model.blocks[1])
        for put in (lambda m: add_lora(m), lambda m: load_adapter(m, tmp_path)):
            with pytest.raises(ValueError, match=r"blocks\.1 is compiled: call torch.compile last"):
                put(model)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, **options):
        return self.module(x, **options)


def test_a_wrapper_that_changes_names_is_seen_at_saving(tmp_path):
    model = adapted()
    blocks = model.get_base_model().blocks
    blocks[1] = Wrapper(blocks[1])
    with pytest.raises(ValueError, match=r"blocks\.1\.module\.attn\.qkv is not among the target modules.*take it off"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = adapted()
    with torch.no_grad():
        model.get_base_model().blocks[1].mlp.fc1.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc1\.lora_B.*NaN or infinite.*nothing to save"):
        save_adapter(model, tmp_path)


# Arguments


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modules_to_save": ["hed"]}, "names 'hed', which is no module; near it are head"),
        ({"modules_to_save": ["head", "pos_embed"]}, "names 'pos_embed', a parameter, and only whole modules"),
        (
            {"modules_to_save": "head"},
            r"modules_to_save is 'head'; it must be a list of module names, such as \[",
        ),
        ({"modules_to_save": [""]}, "must be a list of module names"),
        ({"modules_to_save": ["blocks.0"]}, r"'blocks\.0', which holds the adapted layer blocks\.0\.attn\.qkv"),
        ({"modules_to_save": ["mlp"]}, r"'mlp', which holds the adapted layer blocks\.0\.mlp\.fc1"),
        ({"adapter_name": "x.y"}, "adapter_name is 'x.y'; it must be a word without dots"),
        ({"adapter_name": "weight"}, "adapter_name is 'weight'"),
        ({"adapter_name": "keys"}, "adapter_name is 'keys'"),
        ({"adapter_name": ""}, "adapter_name is ''"),
        ({"rank": 4.0}, "rank is 4.0; it must be a whole number of 1 or more"),
        ({"rank": "4"}, "rank is '4'; it must be a whole number"),
        ({"rank": True}, "rank is True; it must be a whole number"),
        ({"alpha": "8"}, "alpha is '8'; it must be a finite number above 0"),
        ({"alpha": float("nan")}, "alpha is nan; it must be a finite number above 0"),
        ({"dropout": "0.1"}, "dropout is '0.1'"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"targets": 3}, "targets is 3; it must be one of all, attention, mlp, or a list of module names"),
        ({"targets": [3]}, r"targets is \[3\]; it must be"),
        ({"rank_pattern": ["fc1"]}, r"rank_pattern is \['fc1'\]; it must map"),
        ({"rank_pattern": {"fc(": 2}}, r"rank_pattern key 'fc\(' is no module name or regular expression"),
        ({"rank_pattern": {1: 2}}, "rank_pattern key 1 matches none"),
        ({"rank_pattern": {"fc1": 2.5}}, r"rank_pattern\['fc1'\] is 2.5; it must be a whole number"),
        ({"alpha_pattern": {"fc1": "2"}}, r"alpha_pattern\['fc1'\] is '2'; it must be a finite number above 0"),
        ({"alpha_pattern": {"*": 2.0}}, r"alpha_pattern key '\*' is no module name"),
    ],
)
def test_arguments_that_hit_nothing_or_are_of_another_type(options, message):
    with pytest.raises(ValueError, match=message):
        add_lora(small_vit(), **{"rank": 4, **options})


@pytest.mark.parametrize(
    "kind, options",
    [
        (ABMConfig, {"steps": 2.5}),
        (ABMConfig, {"steps": "20"}),
        (ABMConfig, {"samples": None}),
        (ABMConfig, {"batch_size": True}),
        (ABMConfig, {"margin": "0.5"}),
        (ABMConfig, {"margin": float("inf")}),
        (ABMConfig, {"learning_rate": float("inf")}),
        (ABMConfig, {"seed": -1}),
        (ABMConfig, {"seed": 0.5}),
        (AlignConfig, {"samples": 0.5}),
        (AlignConfig, {"norm": "2"}),
        (AlignConfig, {"match": None}),
        (AlignConfig, {"size": float("nan")}),
        (AlignConfig, {"seed": -1}),
    ],
)
def test_settings_of_another_type(kind, options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is {options[name]!r}; it must be"):
        kind(**options)


def test_a_further_adapter_has_the_mode_of_the_model():
    for training in (False, True):
        model = add_lora(small_vit().train(training), rank=4, dropout=0.5)
        add_lora(model, rank=4, dropout=0.5, adapter_name="second")
        assert {m.training for m in model.modules()} == {training}


# What every output says


def test_check_adapters_weighs_every_output():
    """The first of several feature maps does not depend on the last block."""
    model = timm.create_model("test_vit", features_only=True, img_size=32, out_indices=(0, 3))
    model = add_lora(model, rank=4, targets=["blocks.3.mlp.fc1", "blocks.0.attn.qkv"], backbone=VIT)
    check_adapters(model, X, backbone=VIT)


def test_check_adapters_says_why_nothing_comes_back():
    model = timm.create_model("swinv2_tiny_window8_256", img_size=64, window_size=4, depths=(1, 1, 1, 1), num_classes=5)
    norms = [m.norm2 for m in model.modules() if hasattr(m, "norm2")]
    nn.init.zeros_(norms[-1].weight)
    model = add_lora(model, rank=2)
    with pytest.raises(
        ValueError, match=r"They run, but frozen weights behind them are zero.*norm2\.weight.*pretrained"
    ):
        check_adapters(model, images(2, 64))


def test_check_adapters_says_which_are_not_called():
    model = adapted()
    model.get_base_model().blocks[1].forward = lambda x, **_: x
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv \(default\).*forward pass does not call them"):
        check_adapters(model, X)


# Half precision


@pytest.mark.parametrize("what", ["model", "adapter"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matching_in_half_precision_follows_float32(what, dtype):
    def matched(dtype):
        model = adapted()
        for name, parameter in model.named_parameters():
            if what == "model" or ".lora_" in name:
                parameter.data = parameter.data.to(dtype)
        batches = [X.to(dtype if what == "model" else torch.float32)]
        return initialize_lora_abm_weights(model, batches, FAST, show_progress_bar=False)

    half, single = matched(dtype), matched(torch.float32)
    assert half.after.loss == pytest.approx(single.after.loss, rel=0.02)
    assert half.loss_per_step == pytest.approx(single.loss_per_step, rel=0.02)


def test_gradients_in_float16_are_not_rounded_to_zero():
    def loss(model, batch):
        return 1e-6 * F.cross_entropy(model(batch[0]).float(), batch[1])

    model = randomise(adapted())
    expected = information_loss(model, [(X, Y)], loss)
    found = information_loss(model.half(), [(X.half(), Y)], loss)
    assert found.overall.energy == pytest.approx(expected.overall.energy, rel=0.05)
    assert found.overall.loss == pytest.approx(expected.overall.loss, abs=0.02)


# Threads


@pytest.mark.parametrize("name", ["eva", "abm_aligned", "pissa_niter_16"])
def test_threads_with_a_model_each_get_what_one_gets(name):
    def begin(model):
        initialize_lora(model, name, BATCHES, config=fast(name), show_progress_bar=False)

    models = [adapted() for _ in range(5)]
    begin(models[0])
    torch.manual_seed(5)
    state = torch.get_rng_state()
    threads = [threading.Thread(target=begin, args=(model,)) for model in models[1:]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert torch.equal(torch.get_rng_state(), state)
    expected = models[0].state_dict()
    for model in models[1:]:
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_an_error_leaves_dropout_in_its_mode():
    model = adapted(dropout=0.5).train()
    bad = [(X, Y), (X[:, :1], Y)]
    with pytest.raises(ValueError, match="the model cannot take a batch"):
        initialize_lora(model, "eva", bad, show_progress_bar=False)
    assert all(m.training for m in model.modules())
    assert [type(layer.lora_dropout["default"]) for layer in (model.get_base_model().blocks[0].mlp.fc1,)] == [
        nn.Dropout
    ]


# Other doors to the same faults


def test_a_model_without_its_adapter_still_has_the_changed_base():
    model = initialised("pissa")
    with pytest.raises(ValueError, match="adapter 'default' has changed the base weights, and .* still has"):
        add_lora(model.unload())
    merged = trained(initialised("pissa"), X, Y).merge_and_unload()
    add_lora(merged, adapter_name="next")  # what was taken out has been put back
    assert not [name for name in merged.state_dict() if "start_" in name]


@pytest.mark.parametrize("strict", [True, False])
def test_the_state_of_the_model_inside_is_guarded_too(strict):
    model, fresh = trained(initialised("pissa"), X, Y), adapted()
    with pytest.raises(ValueError, match="changed by the initialisation of its adapter, the model's is unchanged"):
        fresh.get_base_model().load_state_dict(model.get_base_model().state_dict(), strict=strict)


def test_files_of_stock_peft_hold_no_more_than_stock_pefts(tmp_path):
    """`save_pretrained` of a changed base is peft's own raw file, which repeats the change when it is loaded."""
    model = trained(initialised("olora"), X, Y)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "adapter_model.safetensors") if "start_" in name]
    torch.testing.assert_close(load_adapter(small_vit(), tmp_path).eval()(X), model(X), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["head", "modules_to_save", "lora_A"])
def test_an_adapter_that_cannot_be_added_leaves_the_model_as_it_was(name):
    model = small_vit()
    before = {n: id(m) for n, m in model.named_modules()}
    try:
        add_lora(model, rank=4, adapter_name=name)
    except ValueError:
        assert {n: id(m) for n, m in model.named_modules()} == before
        assert all(p.requires_grad for p in model.parameters())
        add_lora(model, rank=4)


def test_a_replaced_layer_and_a_changed_scaling_are_seen_at_saving(tmp_path):
    model = adapted()
    model.get_base_model().blocks[1].mlp.fc1 = nn.Linear(32, 96)
    for verb in (lambda: save_adapter(model, tmp_path), lambda: check_adapters(model, X)):
        with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.fc1' of adapter 'default' was replaced"):
            verb()
    model = adapted()
    model.get_base_model().blocks[1].mlp.fc1.set_scale("default", 2)
    with pytest.raises(ValueError, match=r"the scaling of blocks\.1\.mlp\.fc1 is 3, and a loader would find 1\.5"):
        save_adapter(model, tmp_path)


def test_numbers_of_numpy_are_saved(tmp_path):
    model = add_lora(small_vit(), np.int64(4), np.float32(6), rank_pattern={"fc1": np.int64(2)})
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    with pytest.raises(ValueError, match="the settings report cannot be written as JSON"):
        save_adapter(model, tmp_path, report=torch.zeros(2))


def test_the_blocks_of_q_and_v_survive_the_meta_device():
    with torch.device("meta"):
        base = timm.create_model("test_vit", img_size=32, num_classes=5, embed_dim=32, depth=2, num_heads=2)
    model = add_lora(base, rank=4, qkv="qv").to_empty(device="cpu")
    whole = add_lora(small_vit(), rank=4, qkv="qv")
    model.load_state_dict(whole.state_dict())
    gradients = []
    for one in (model.eval(), whole.eval()):
        F.cross_entropy(one(X), Y).backward()
        gradients.append({n: p.grad for n, p in one.named_parameters() if "lora_B" in n})
    assert all(torch.equal(gradients[0][n], g) for n, g in gradients[1].items())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: initialize_lora(m, "abm", BATCHES, config=AlignConfig()), "config is .*of type ABMConfig"),
        (lambda m: initialize_lora(m, "eva", BATCHES, config=ABMConfig()), "config is .*of type InitConfig"),
        (lambda m: initialize_lora_abm_weights(m, BATCHES, AlignConfig()), "config is .*of type ABMConfig"),
        (lambda m: initialize_lora(m, 5), "init is 5; allowed are"),
        (lambda m: initialize_lora(m, ["pissa"]), "init is .'pissa'.; allowed are"),
        (lambda m: initialize_lora(m, "eva", 5), "the dataloader is 5; it must yield batches"),
        (lambda m: initialize_lora(m, "kaiming", adapter_name=["default"]), "adapter_name is .'default'."),
        (lambda m: initialize_lora(nn.DataParallel(m), "kaiming"), "pass the model inside, model.module"),
        (lambda m: add_lora("test_vit"), "the model is 'test_vit'; it must be a torch.nn.Module"),
        (lambda m: add_lora(small_vit(), modules_to_save=5), "modules_to_save is 5"),
        (lambda m: add_lora(small_vit(), modules_to_save=["blocks"]), "'blocks', which holds the adapted layer"),
        (lambda m: ABMConfig(layers=[1]), "a list must hold module names"),
        (lambda m: ABMConfig(seed=2**64), "it must be less than 2"),
        (
            lambda m: initialize_lora_abm_weights(m, BATCHES, FAST, reference=build_vit(depth=2)),
            "must be models of the same width",
        ),
    ],
)
def test_arguments_of_other_kinds(call, message):
    with pytest.raises(ValueError, match=message):
        call(adapted())
