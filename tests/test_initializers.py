"""Every start of the table: against stock peft, through files, and what is refused."""

import copy
import math
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import build_vit, images, randomise
from helpers import FAST, fast, small_vit, trained
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file
from torch import nn

from abm_vision import add_lora, initialize_lora, load_adapter, save_adapter
from abm_vision.abm import moments
from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.loading import load_reference
from abm_vision.initializers import INITIALIZERS, Needs, Properties, get_initializer
from abm_vision.vit import VIT

TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
X, Y = images(16), torch.arange(16) % 5
BATCHES = [(X[:8], Y[:8]), (X[8:], Y[8:])]
WITHOUT_REFERENCE = [name for name, row in INITIALIZERS.items() if Needs.REFERENCE not in row.needs]


def having(properties):
    return [name for name, row in INITIALIZERS.items() if properties in row.properties]


def started(name, base=None, batches=BATCHES, **options):
    """An adapter initialised by a row of the table, in evaluation mode."""
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(base) if base else small_vit(), **{"rank": 4, "alpha": 6, **options}).eval()
    reference = None
    if Needs.REFERENCE in INITIALIZERS[name].needs:
        model = randomise(add_lora(model, rank=2, adapter_name="tuned"), adapter="tuned")
        reference = "tuned"
    initialize_lora(model, name, batches, config=fast(name), reference=reference, show_progress_bar=False)
    if reference:
        model.delete_adapter("tuned")
    return model


def test_the_table():
    for name, row in INITIALIZERS.items():
        assert row.name == name and row.summary and row.source
    needed = {str(row.needs) for row in INITIALIZERS.values()}
    assert needed == {"nothing", "batches", "labelled batches", "batches and a reference"}
    assert set(having(Properties.CHANGES_BASE)) == {"pissa", "pissa_niter_16", "olora", "corda", "lora_ga"}
    offered = {"gaussian", "orthogonal", "pissa", "olora", "mica", "eva", "corda", "lora_ga"}  # peft 0.21
    assert offered < set(INITIALIZERS)


# Rank and alpha patterns with rsLoRA are what peft's own conversion refuses.
@pytest.mark.parametrize("options", [{}, {"rslora": True, "rank_pattern": {"fc1": 2}, "alpha_pattern": {"proj": 3}}])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_trained_adapter_loads_in_stock_peft_on_the_untouched_base_and_merges(name, options, tmp_path):
    base = small_vit()
    model = trained(started(name, base, **options), X, Y)
    expected = model(X)
    assert (expected - base(X)).abs().max() > 0.05  # it has learned something
    save_adapter(model, tmp_path)
    near = {"rtol": 0, "atol": 1e-5}
    stock = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(stock(X), expected, **near)
    torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path).eval()(X), expected, **near)
    torch.testing.assert_close(stock.merge_and_unload()(X), expected, **near)
    config = LoraConfig.from_pretrained(tmp_path)
    if Properties.CHANGES_BASE in INITIALIZERS[name].properties:
        assert config.init_lora_weights is True and config.r == 8
    torch.testing.assert_close(model.merge_and_unload()(X), expected, **near)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_output_at_the_start(name):
    base = small_vit()
    moved = (started(name, base)(X) - base(X)).abs().max().item()
    if name in ("random_b", "abm", "abm_tuned", "abm_aligned"):
        assert moved > 1e-4  # these move the model, as little as boundaries allow
    else:
        assert moved < 1e-5


@pytest.mark.parametrize("name", having(Properties.CHANGES_BASE))
def test_saving_leaves_the_live_model_as_it_was(name, tmp_path):
    model = started(name)
    before, config = model(X), copy.deepcopy(model.peft_config["default"])
    save_adapter(model, tmp_path)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    assert model.peft_config["default"].to_dict() == config.to_dict()


def test_conversion_against_pefts_own(tmp_path):
    model = started("pissa", alpha=8)
    model.peft_config["default"].init_lora_weights = True
    start = tmp_path / "start"
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    trained(model, X, Y)
    save_adapter(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "pefts", path_initial_model_for_weight_conversion=str(start))
    ours, pefts = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "pefts"))
    assert {n for n in ours if "lora_" in n} == set(pefts)  # peft's leaves out the head
    assert any("head" in n for n in ours)
    for name, value in pefts.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0)
    configs = [LoraConfig.from_pretrained(tmp_path / n) for n in ("ours", "pefts")]
    assert configs[0].r == configs[1].r == 8 and configs[0].lora_alpha == configs[1].lora_alpha == 16


# ------------------------------------------------------------------------------------------ the same as in stock peft


def stock(config, prepare=None):
    """Stock peft's way to the same start: before wrapping, on a bare model."""
    base = small_vit()
    if prepare:
        prepare(base, config)
    torch.manual_seed(0)
    return get_peft_model(base, config)


def assert_same_start(model, other, **tolerance):
    for name, layer in adapted_layers(model, "default").items():
        theirs = other.get_base_model().get_submodule(name)
        ours = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        near = tolerance or {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(ours, product, **near)
        torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight, **near)
        for factor in ("lora_A", "lora_B"):
            mine, other_factor = (getattr(m, factor)["default"].weight for m in (layer, theirs))
            assert mine.shape == other_factor.shape and mine.requires_grad == other_factor.requires_grad
            torch.testing.assert_close(mine.norm(), other_factor.norm(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "olora", "mica"])
def test_weight_starts_are_stock_pefts(name):
    assert_same_start(
        started(name), stock(LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights=name))
    )


def test_corda_is_stock_pefts():
    def prepare(base, config):
        preprocess_corda(base, config, run_model=lambda: [base(x[None]) for x in X])

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )
    assert_same_start(started("corda"), stock(config, prepare))


def test_lora_ga_is_stock_pefts():
    def prepare(base, config):
        preprocess_loraga(base, config, lambda: F.cross_entropy(base.eval()(X), Y).backward())

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()
    )
    # Singular pairs of a full-rank gradient by a randomised decomposition: equal to its accuracy.
    assert_same_start(started("lora_ga", batches=[(X, Y)]), stock(config, prepare), rtol=1e-2, atol=1e-4)


def test_eva_of_one_batch_is_stock_pefts():
    """peft goes batch by batch, so that of several it depends on their order."""
    model = stock(
        LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig())
    )
    initialize_lora_eva_weights(
        model,
        [(X, Y)],
        forward_fn=lambda m, b: m(b[0]),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    ours = started("eva", batches=[(X, Y)])
    assert set(adapted_layers(ours, "default")) == set(adapted_layers(model, "default"))
    assert_same_start(ours, model)


@pytest.mark.parametrize("held", [2**31, 1])
def test_eva_against_a_decomposition_of_all_inputs(held, monkeypatch):
    """In double precision, whatever the batches, all layers at once or one after another."""
    monkeypatch.setattr(moments, "HELD", held)
    base, inputs = small_vit().double(), {}
    for name, module in base.named_modules():
        if name.endswith(tuple(TARGETS)):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        base(X.double())
    leading = {}
    for name, x in inputs.items():
        _, values, directions = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        leading[name] = directions[:8], (values**2 / (values**2).sum())[:8]  # twice the rank
    every = sorted(((share, name) for name, (_, shares) in leading.items() for share in shares), reverse=True)
    ranks = Counter(name for _, name in every[: 4 * len(leading)])
    layers = adapted_layers(started("eva", batches=[(X[:3], Y[:3]), (X[3:4], Y[3:4]), (X[4:], Y[4:])]), "default")
    assert {name: layer.r["default"] for name, layer in layers.items()} == ranks
    for name, layer in layers.items():
        ours, expected = layer.lora_A["default"].weight.double(), leading[name][0][: ranks[name]]
        torch.testing.assert_close((ours * expected).sum(1).abs(), torch.ones(ranks[name]).double(), rtol=0, atol=1e-4)


def test_layers_with_one_input_share_their_moments():
    x = torch.randn(6, 3)
    layers = {name: nn.Linear(3, 2) for name in "qkv"}

    def forward(batch):
        for layer in (layers["q"], layers["k"]):
            layer(x)
        layers["v"](x + 1)

    found = {
        tuple(names): sums for names, sums in moments.input_moments(layers, [0, 1], forward, lambda *given: given[2])
    }
    assert set(found) == {("q", "k"), ("v",)} and found["q", "k"].count == 12
    _, share = found["q", "k"].principal(3)
    assert share.sum().item() == pytest.approx(1)


def test_gaussian_orthogonal_and_random_b_by_their_definition():
    many = {"rank": 16, "alpha": 16}
    for layer in adapted_layers(started("gaussian", **many), "default").values():
        assert layer.lora_A["default"].weight.std().item() == pytest.approx(1 / 16, rel=0.15)
        assert not layer.lora_B["default"].weight.any()
    for layer in adapted_layers(started("orthogonal", **many), "default").values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert a.any() and b.any() and (b @ a).abs().max() < 1e-5
    for layer in adapted_layers(started("random_b", **many), "default").values():
        assert layer.lora_B["default"].weight.std().item() == pytest.approx(0.01, rel=0.15)
        assert layer.lora_A["default"].weight.abs().max() <= 1 / math.sqrt(layer.in_features)


@pytest.mark.parametrize("name", ["gaussian", "random_b", "eva", "lora_ga", "abm", "abm_aligned"])
def test_seed_fixes_the_start_and_nothing_else_moves(name):
    models = [started(name) for _ in range(2)]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    torch.manual_seed(1)
    model = add_lora(small_vit(), rank=4).train()
    state = torch.get_rng_state()
    initialize_lora(model, name, BATCHES, config=fast(name), show_progress_bar=False)
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "head" in n for n in trainable) and any("lora_B" in n for n in trainable)


@pytest.mark.parametrize("name", having(Properties.BLOCKS))
def test_k_is_left_alone(name, tmp_path):
    base = small_vit()
    model = trained(started(name, base, qkv="qv"), X, Y)
    for layer_name, layer in adapted_layers(model, "default").items():
        if layer_name.endswith("qkv"):
            dim = layer.out_features // 3
            assert not layer.get_delta_weight("default")[dim : 2 * dim].any()
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(stock(X), model(X), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- a tuned reference


def test_reference_from_a_file_has_its_signs_and_not_its_head(tmp_path):
    tuned = randomise(add_lora(build_vit(embed_dim=32, depth=2, num_heads=2, num_classes=7), rank=2).eval())
    save_adapter(tuned, tmp_path)
    model = add_lora(small_vit(), rank=4).eval()
    load_reference(model, tmp_path)
    assert list(model.active_adapters) == ["default"]
    for name, layer in adapted_layers(tuned, "default").items():
        loaded = model.get_base_model().get_submodule(name)
        torch.testing.assert_close(loaded.get_delta_weight("reference"), layer.get_delta_weight("default"))
        assert not loaded.lora_A["reference"].weight.requires_grad
    before = model(X)
    report = initialize_lora(model, "abm_tuned", BATCHES, config=FAST, reference="reference", show_progress_bar=False)
    assert report.reference == "adapter 'reference'" and report.before.match < 1
    model.delete_adapter("reference")
    assert (model(X) - before).abs().max() > 0 and model(X).shape == (16, 5)


def test_reference_that_does_not_fit(tmp_path):
    save_adapter(add_lora(build_vit(embed_dim=64, depth=2, num_heads=2), rank=2), tmp_path / "wide")
    save_adapter(add_lora(build_vit(embed_dim=32, depth=3, num_heads=2), rank=2), tmp_path / "deep")
    for kind in ("wide", "deep"):
        with pytest.raises(ValueError, match=f"reference .*{kind} does not fit this model"):
            load_reference(add_lora(small_vit(), rank=2), tmp_path / kind)
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_reference(add_lora(small_vit(), rank=2), tmp_path / "nothing")


# ---------------------------------------------------------------------------------------------------------- refused


def refused(name, message, batches=BATCHES, model=None, **options):
    with pytest.raises(ValueError, match=message):
        initialize_lora(model or add_lora(small_vit(), rank=4), name, batches, **options)


def test_refused():
    refused("abm_align", "init is 'abm_align'; allowed are kaiming, .*did you mean abm_aligned")
    refused("eva", "eva needs batches: pass a dataloader", batches=None)
    refused("lora_ga", "lora_ga needs labelled batches: pass a dataloader", batches=None)
    refused("abm_tuned", "abm_tuned needs a reference")
    refused("abm_aligned", "holds no labels.*loss_fn", batches=[X])
    refused("lora_ga", "holds no labels.*loss_fn", batches=[(X,)])
    refused("abm", "the dataloader is empty", batches=[])
    refused("kaiming", "VisionTransformer is no PeftModel: call add_lora first", model=small_vit())
    refused("pissa", "cannot leave k alone", model=add_lora(small_vit(), rank=4, qkv="qv"))
    second = add_lora(add_lora(small_vit(), rank=4), rank=4, adapter_name="second")
    refused("pissa", "active adapters are", model=second, adapter_name="second")
    refused("orthogonal", "even", model=add_lora(small_vit(), rank=3))
    refused("eva", r"16 directions, blocks\.0\.attn\.qkv sees 5 tokens", [X[:1]], model=add_lora(small_vit(), rank=8))


@pytest.mark.parametrize("name, batches", [("lora_ga", [X]), ("corda", [X[0]]), ("eva", [(X, Y), (X[:, :1], Y)])])
def test_an_error_leaves_a_fresh_adapter(name, batches):
    torch.manual_seed(1)
    model = add_lora(small_vit(), rank=4).train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    attributes = [set(vars(m)) for m in model.modules()]
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        initialize_lora(model, name, batches, show_progress_bar=False)
    assert flags == [p.requires_grad for p in model.parameters()] and model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert attributes == [set(vars(m)) for m in model.modules()]
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert model.peft_config["default"].init_lora_weights is True
    initialize_lora(model, "pissa")


def test_reference_that_was_saved_raw_or_damaged(tmp_path):
    started("pissa").save_pretrained(tmp_path / "raw")
    with pytest.raises(ValueError, match="saved raw after init 'pissa'.*save it with save_adapter"):
        load_reference(add_lora(small_vit(), rank=4), tmp_path / "raw")
    with pytest.raises(ValueError, match="saved raw after init 'pissa'.*under the other adapters"):
        load_adapter(add_lora(small_vit(), rank=4), tmp_path / "raw", adapter_name="second")
    for name in (
        "lora_ga",
        "corda",
        "pissa_niter_16",
    ):  # as a Trainer's checkpoint is
        started(name).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"saved raw after init '{name}', by peft or a Trainer.*cannot repeat it"):
            load_adapter(small_vit(), tmp_path / name)
    load_adapter(small_vit(), tmp_path / "raw")  # peft repeats it from the weights
    save_adapter(started("gaussian"), tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_model.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_reference(add_lora(small_vit(), rank=4), tmp_path / "damaged")


@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_autocast_of_the_caller_costs_no_precision(name, tmp_path):
    """Decompositions and what is taken out of the weights run in full precision, whatever the passes run in."""
    base = small_vit()
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(base), rank=4).eval()
    with torch.autocast("cpu", torch.bfloat16):
        initialize_lora(model, name, BATCHES, config=fast(name), show_progress_bar=False)
    if name not in ("random_b", "abm", "abm_aligned"):
        torch.testing.assert_close(model(X), base(X), rtol=0, atol=1e-5)
    save_adapter(model, tmp_path)
    stock = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(stock(X), model(X), rtol=0, atol=1e-5)


def test_dropout_is_in_the_models_mode():
    torch.manual_seed(1)
    model = add_lora(small_vit(), rank=4, dropout=0.5).eval()
    initialize_lora(model, "gaussian")
    assert not any(m.training for m in model.modules())


def test_odd_rank_leaves_a_fresh_adapter():
    model = add_lora(small_vit(), rank=3)
    refused("orthogonal", "even", model=model)
    assert not any(layer.lora_B["default"].weight.any() for layer in adapted_layers(model, "default").values())


def test_base_is_changed_once():
    model = started("pissa")
    refused("olora", "'default' has changed the base weights: begin with the bare model", model=model)
    refused("abm", "has changed the base weights", model=model)
    refused("kaiming", "not fresh", model=started("gaussian"))
    refused("eva", "not fresh", model=trained(add_lora(small_vit(), rank=4), X, Y))
    beside = add_lora(add_lora(small_vit(), rank=4), rank=4, adapter_name="second")
    for name in ("pissa", "eva"):
        refused(name, f"{name} changes more than its adapter, which second would suffer", model=beside)


def test_convolutions_are_named():
    model = add_lora(timm.create_model("mobilevitv2_050", num_classes=5), rank=2)
    refused("pissa", "is for nn.Linear layers alone, .* is a Conv2d", model=model)


def test_labels_may_be_in_a_mapping():
    for key in ("labels", "label", "target"):
        loss = VIT.loss_fn(small_vit(), {"image": X, key: Y})
        torch.testing.assert_close(loss, F.cross_entropy(small_vit()(X), Y))


def test_nearest_names():
    with pytest.raises(ValueError, match="did you mean pissa"):
        get_initializer("pisa")


def test_a_loss_of_ones_own():
    model = add_lora(small_vit(), rank=4)
    loss = nn.MSELoss()
    initialize_lora(model, "abm_aligned", [X], loss_fn=lambda m, b: loss(m(b), torch.ones(16, 5)))
    assert all(layer.lora_B["default"].weight.any() for layer in adapted_layers(model, "default").values())


@pytest.mark.parametrize("name", ["corda", "eva", "gaussian", "lora_ga"])
def test_every_module_stays_in_training_mode(name):
    model = add_lora(small_vit(), rank=4, dropout=0.5).train()
    initialize_lora(model, name, BATCHES, config=fast(name), show_progress_bar=False)
    assert all(module.training for module in model.modules())


def test_running_statistics_are_kept():
    torch.manual_seed(0)
    model = add_lora(timm.create_model("levit_128s", num_classes=5), targets=["mlp.ln1.linear"], rank=2).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    initialize_lora(model, "eva", [batch], backbone=VIT, show_progress_bar=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers() if "running" in name)


def test_dora_adapters_are_fresh_too():
    model = add_lora(small_vit(), rank=4, dora=True)
    assert initialize_lora(model, "abm", BATCHES, config=FAST, show_progress_bar=False).layers
    model = add_lora(add_lora(small_vit(), rank=4, dora=True), rank=4, adapter_name="plain")
    model.set_adapter("plain")
    initialize_lora(model, "abm", BATCHES, config=FAST, adapter_name="plain", show_progress_bar=False)
    with pytest.raises(ValueError, match="not fresh"):
        initialize_lora(model, "abm", BATCHES, config=FAST, adapter_name="plain", show_progress_bar=False)
