"""initialize_lora_abm_weights: the figures against plain loops over two models, and everything that it guards."""

import copy
import itertools
import json
import random
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import build_vit, images, randomise
from helpers import ACTS, FAST, factors, figures, match, record, rows_of, same, values
from peft import IA3Config, LoraConfig, get_peft_model
from torch.utils.data import DataLoader, TensorDataset

import vtab_tasks
from abm_vision import VIT, ABMConfig, add_lora, initialize_lora_abm_weights
from abm_vision.abm import hooks
from abm_vision.abm import match as match_page
from abm_vision.abm.adapter import Adapter
from abm_vision.abm.boundary import choose_boundaries
from abm_vision.abm.reference import calibrate, masked
from vtab_tasks.sources import rendered

pytestmark = pytest.mark.usefixtures("device")

# The procedure


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("qkv", ["full", "qv"])
def test_equals_the_procedure_of_the_paper_with_two_full_models(merged, qkv):
    """Eq. (22) with two models side by side, plain hooks, autograd and AdamW, against ours."""
    pretrained = build_vit().double().eval()
    torch.manual_seed(1)
    model = add_lora(copy.deepcopy(pretrained), 4, qkv=qkv, merged_linear=merged).double()
    student = copy.deepcopy(model)
    batches = [images(3, seed=s).double() for s in range(3)]
    config = ABMConfig(steps=5, samples=9, margin=0.4, learning_rate=0.01, layers=4)
    report = match(model, batches, config)

    trained = list(factors(student).values())
    optimiser = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for step, rate in enumerate((1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)):
        batch = batches[step % 3]
        z, reference = record(student, batch), record(pretrained, batch)
        loss = 0
        for depth, name in enumerate(ACTS[2:]):
            tau = reference[name].detach().sign()
            loss = loss + ((depth + 1) / 4) ** 2 * (0.4 - tau * z[name]).clamp_min(0).square().mean() / 4
        optimiser.zero_grad()
        loss.backward()
        for group in optimiser.param_groups:
            group["lr"] = 0.01 * rate
        optimiser.step()
        losses.append(loss.item())

    assert report.loss_per_step == pytest.approx(losses, rel=1e-4)
    expected = values(student)
    moved = 0
    for name, value in values(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=name)
        moved += bool(value.any())
    assert moved > 30
    torch.testing.assert_close(
        rows_of(report, "after"), figures(student, pretrained, batches, 0.4, ACTS[2:]), rtol=1e-3, atol=1e-4
    )


def test_report_before_and_after_equals_two_models_side_by_side():
    pretrained = build_vit().eval()
    model = randomise(add_lora(copy.deepcopy(pretrained))).eval()
    batches = [images(4, seed=0), images(2, seed=1)]
    before = figures(model, pretrained, batches, 0.5)
    report = match(model, batches, replace(FAST, samples=6))
    torch.testing.assert_close(rows_of(report, "before"), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows_of(report, "after"), figures(model, pretrained, batches, 0.5), rtol=1e-4, atol=1e-5)
    weights = torch.tensor([((i + 1) / 6) ** 2 for i in range(6)], dtype=torch.float64)
    assert report.before.loss == pytest.approx((weights * before[:, 0]).mean().item(), rel=1e-4)
    assert report.before.match == pytest.approx(before[:, 1].mean().item(), rel=1e-5)
    assert report.samples == 6 and report.reference == "pretrained" and report.seconds > 0


def test_a_fresh_adapter_is_the_pretrained_model():
    """B = 0: every sign matches, and the loss comes from the units inside the margin alone."""
    pretrained = build_vit().eval()
    model = add_lora(copy.deepcopy(pretrained))
    expected = figures(pretrained, pretrained, [images(4, seed=s) for s in range(2)], 0.5)
    report = match(model)
    assert report.before.match == 1 and report.before.inside > 0
    torch.testing.assert_close(rows_of(report, "before"), expected, rtol=1e-4, atol=1e-6)
    assert all(p.any() for n, p in factors(model).items() if "lora_B" in n and "5.mlp.fc2" not in n)


def test_margin_zero_has_nothing_to_do():
    model = add_lora(build_vit())
    report = match(model, config=replace(FAST, margin=0.0))
    assert report.loss_per_step == (0.0, 0.0, 0.0) and report.after.match == 1
    assert not any(p.any() for n, p in factors(model).items() if "lora_B" in n)


def test_layers_behind_the_last_boundary_are_left_alone():
    model = add_lora(build_vit())
    start = values(model)
    match(model, config=replace(FAST, layers=[ACTS[2]]))
    changed = {n for n, v in values(model).items() if not torch.equal(v, start[n])}
    assert changed and all(int(n.split("blocks.")[1][0]) <= 2 for n in changed)
    assert not any("blocks.2.mlp.fc2" in n for n in changed)


@pytest.mark.parametrize("layers, names", [("all", ACTS), (2, ACTS[4:]), ([ACTS[3], ACTS[0]], [ACTS[0], ACTS[3]])])
@pytest.mark.parametrize("weights", ["quadratic", "uniform"])
def test_layers_and_their_weights(layers, names, weights):
    report = match(add_lora(build_vit()), config=replace(FAST, layers=layers, layer_weights=weights))
    assert [layer.name for layer in report.layers] == names
    n = len(names)
    expected = [((i + 1) / n) ** 2 for i in range(n)] if weights == "quadratic" else [1.0] * n
    assert [layer.weight for layer in report.layers] == pytest.approx(expected)


def test_relative_margin_is_a_multiple_of_each_layers_own_scale():
    vit = build_vit().eval()
    scale = {n: z.double().square().mean().sqrt().item() for n, z in record(vit, images(4)).items()}
    report = match(add_lora(vit), [images(4)], replace(FAST, margin=0.25, margin_unit="relative", samples=4))
    for layer in report.layers:
        assert layer.margin == pytest.approx(0.25 * scale[layer.name], rel=1e-5)


def test_relative_margin_counts_only_tokens_that_count():
    config = replace(FAST, margin=0.25, margin_unit="relative", samples=4)
    z = record(build_vit().eval(), images(4))[ACTS[0]][:2].double()
    mask = (torch.arange(4) < 2)[:, None].expand(4, 5)
    report = match(add_lora(build_vit()), [images(4)], config, token_mask_fn=lambda batch, stack: mask)
    assert report.layers[0].margin == pytest.approx(0.25 * z.square().mean().sqrt().item(), rel=1e-5)


def test_nothing_above_the_last_boundary_runs_and_the_reference_runs_once_a_batch():
    model = add_lora(build_vit())
    calls = {"last": 0, "reference": 0, "adapted": 0}
    layer = model.get_base_model().blocks[0].mlp.fc1
    model.get_base_model().blocks[5].register_forward_pre_hook(lambda *_: calls.update(last=calls["last"] + 1))
    layer.register_forward_pre_hook(
        lambda m, _: calls.update({k: calls[k] + 1 for k in ["reference" if m.disable_adapters else "adapted"]})
    )
    match(model, config=replace(FAST, layers=ACTS[:5], steps=4))
    assert calls == {"last": 0, "reference": 2, "adapted": 4 + 2}  # 4 steps, and 2 batches measured afterwards


def test_signs_are_kept_as_bits():
    model = add_lora(build_vit()).eval()
    config = ABMConfig(samples=8)
    chosen = choose_boundaries(VIT.find_boundaries(model.get_base_model()), config)
    arguments = (masked([images(8)], chosen, VIT.token_mask_fn), chosen, config, "pretrained", VIT.forward_fn)
    (part,) = calibrate(Adapter(model), *arguments).parts
    elements = 8 * 5 * 192  # images, tokens (2x2 patches and a class token), hidden units
    reference = record(build_vit().eval(), images(8))
    for name in ACTS:
        bits, _ = part.signs._packed[name]
        assert bits.dtype == torch.uint8 and bits.numel() == elements // 8
        assert torch.equal(part.signs[name], reference[name] > 0)


def test_one_step_and_one_sample():
    report = match(add_lora(build_vit()), config=replace(FAST, steps=1, samples=1))
    assert len(report.loss_per_step) == 1 and report.samples == 1


@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        ({}, 8),
        ({"samples": 5}, 5),
        ({"steps": 3, "batch_size": 2}, 6),  # no more than the steps see
        ({"tokens": 15}, 3),  # of 5 a sample
        ({"tokens": 25}, 5),  # into the second batch
        ({"tokens": 4}, 1),
    ],
)
def test_budget_of_samples_and_tokens(settings, samples):
    config = replace(FAST, **{"samples": 8, "batch_size": 4, "steps": 2, **settings})
    report = match(
        add_lora(build_vit()), config=config, token_mask_fn=lambda batch, stack: torch.ones(len(batch), 5).bool()
    )
    assert report.samples == samples


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"image": x, "side": 32, "labels": torch.zeros(len(x))}])
def test_steps_on_parts_of_a_batch_equal_steps_on_small_batches(wrap):
    """And the figures before and after are those of all samples either way. The masks are cut along."""
    pixels, results = images(12), []
    for batches in ([wrap(pixels)], [wrap(p) for p in pixels.split(4)]):
        torch.manual_seed(0)
        model = add_lora(build_vit())

        def mask(batch, stack):
            first = batch if isinstance(batch, torch.Tensor) else batch["image"]
            return first[:, 0, 0, :5] > -0.5  # five tokens

        report = match(model, batches, ABMConfig(steps=5, samples=12, batch_size=5), token_mask_fn=mask)
        results.append((report, values(model)))
    (one, whole), (other, small) = results
    assert one.loss_per_step == pytest.approx(other.loss_per_step, rel=1e-3)
    for name in whole:
        torch.testing.assert_close(whole[name], small[name], rtol=1e-2, atol=1e-4, msg=name)


@pytest.mark.slow
def test_model_that_folds_its_patches_into_the_batch():
    model = add_lora(timm.create_model("tnt_s_legacy_patch16_224", num_classes=2), rank=2, targets="mlp")
    report = match(model, [images(2, 224)], ABMConfig(steps=1, samples=2, batch_size=1, layers=2))
    assert report.before.match == 1


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_loss_never_ends_above_where_it_began(scale, monkeypatch):
    """At a rate at which the steps lead upwards, of a fresh adapter and of one with a B: the way there is halved."""
    config = ABMConfig(steps=4, samples=8, learning_rate=0.1)

    def matched():
        torch.manual_seed(0)
        model = randomise(add_lora(build_vit()), scale)
        first = [p.detach().clone() for p in factors(model).values()]
        return match(model, config=config), first, [p.detach() for p in factors(model).values()]

    report, first, ours = matched()
    monkeypatch.setattr(match_page, "KEPT", (1.0,))
    whole, _, last = matched()
    assert whole.after.loss > whole.before.loss >= report.after.loss and report.before == whole.before
    assert report.kept in (0.5, 0.25, 0.125, 0.0) and whole.kept == 1
    for a, b, c in zip(first, ours, last, strict=True):
        torch.testing.assert_close(b, a + report.kept * (c - a))
    assert f"{report.kept:g} of the way kept" in report.summary() and "kept:" not in whole.summary()
    monkeypatch.setattr(match_page, "KEPT", (1.0, 0.0))
    none, first, ours = matched()
    assert none.kept == 0 and none.after == none.before and all(map(torch.equal, first, ours))
    assert "nothing kept, as every share" in none.summary() and "peft's default" in none.summary()


def test_same_seed_same_result(device):
    if device != "cpu":
        pytest.skip("a loader that shuffles does not run under torch.set_default_device")
    loader = DataLoader(TensorDataset(torch.cat([images(8, seed=s) for s in range(4)])), batch_size=4, shuffle=True)
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        model = add_lora(build_vit())
        torch.manual_seed(random.getrandbits(30))  # the caller's own state has no say
        match(model, loader, replace(FAST, seed=seed, samples=16))
        results.append(values(model))
    assert same(results[0], results[1]) and not same(results[0], results[2])


def test_seed_reaches_loaders_that_draw_with_python_or_numpy():
    class Augmented:
        def __iter__(self):
            yield images(4) * random.random() + float(np.random.rand()) + torch.rand(1)

    results = []
    for _ in range(2):
        torch.manual_seed(0)
        model = add_lora(build_vit())
        match(model, Augmented(), replace(FAST, samples=4))
        results.append(values(model))
        random.random(), np.random.rand()
    assert same(*results)


# References


def test_another_adapter_as_reference():
    model = randomise(add_lora(build_vit(), adapter_name="tuned"), adapter="tuned")
    tuned = copy.deepcopy(model).merge_and_unload().eval()
    add_lora(model, adapter_name="fresh")
    model.set_adapter("fresh")
    kept = values(model, "tuned")
    batches = [images(4, seed=s) for s in range(2)]
    expected = figures(build_vit().eval(), tuned, batches, 0.5)
    config = replace(FAST, steps=40)
    report = match(model, batches, config, reference="tuned", adapter_name="fresh")
    torch.testing.assert_close(rows_of(report, "before"), expected, rtol=1e-3, atol=1e-4)
    assert report.before.match < 1 and report.after.match > report.before.match
    assert report.after.loss < report.before.loss
    assert model.active_adapters == ["fresh"] and same(values(model, "tuned"), kept)
    assert {p.requires_grad for p in factors(model, "fresh").values()} == {True}
    assert {p.requires_grad for p in factors(model, "tuned").values()} == {False}
    assert report.reference == "adapter 'tuned'"


def test_another_model_as_reference():
    torch.manual_seed(5)
    other = build_vit().train()
    other.blocks[2].eval()
    modes = [m.training for m in other.modules()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    batches = [images(4, seed=s) for s in range(2)]
    expected = figures(build_vit().eval(), copy.deepcopy(other).eval(), batches, 0.5)
    report = match(add_lora(build_vit()), batches, reference=other)
    torch.testing.assert_close(rows_of(report, "before"), expected, rtol=1e-4, atol=1e-5)
    assert [m.training for m in other.modules()] == modes and report.reference == "another VisionTransformer"


def test_another_adapted_model_as_reference():
    tuned = randomise(add_lora(build_vit())).eval()
    batches = [images(4, seed=s) for s in range(2)]
    expected = figures(build_vit().eval(), tuned, batches, 0.5)
    report = match(add_lora(build_vit()), batches, reference=tuned)
    torch.testing.assert_close(rows_of(report, "before"), expected, rtol=1e-4, atol=1e-5)


def test_changed_base_needs_another_model_as_reference():
    config = LoraConfig(r=2, target_modules=["mlp.fc1"], init_lora_weights="pissa")
    model = get_peft_model(build_vit().eval(), config)
    with pytest.raises(ValueError, match=r"adapter 'default' has changed the base weights.*copy"):
        match(model)
    assert match(model, reference=build_vit()).before.match > 0.999


# What loaders yield


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: (x, torch.zeros(len(x), dtype=torch.long)),
        lambda x: [x, "a name"],
        lambda x: {"pixel_values": x, "labels": torch.zeros(len(x))},
        lambda x: {"image": x},
    ],
)
def test_batches_of_every_kind(wrap):
    models = [add_lora(copy.deepcopy(build_vit())) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [images(4, seed=s) for s in range(2)]
    match(models[0], batches)
    match(models[1], [wrap(b) for b in batches])
    assert same(values(models[0]), values(models[1]))


def test_forward_fn_of_the_users_own():
    batches = [{"x": images(4)}]
    report = match(add_lora(build_vit()), batches, forward_fn=lambda model, batch: model(batch["x"]))
    assert report.samples == 4


def test_token_mask_leaves_out_tokens():
    """Masking out whole images equals never having had them."""
    results = []
    for batch, mask in ((images(6)[:4], None), (images(6), torch.tensor([1, 1, 1, 1, 0, 0]).bool())):
        torch.manual_seed(0)
        model = add_lora(build_vit())
        token_mask = None if mask is None else mask[:, None].expand(6, 5)
        report = match(model, [batch], replace(FAST, samples=4), token_mask_fn=lambda b, stack, m=token_mask: m)
        results.append(report)
    torch.testing.assert_close(rows_of(results[1], "before"), rows_of(results[0], "before"), rtol=1e-5, atol=1e-6)
    assert results[1].loss_per_step == pytest.approx(results[0].loss_per_step, rel=1e-4)


# State given back


def snapshot(model):
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
        "active": model.active_adapters,
    }


def awkward_model():
    """Some modules in training mode, some not; a stray gradient; base weights partly trainable."""
    model = add_lora(build_vit(drop_path_rate=0.5, attn_drop_rate=0.5, proj_drop_rate=0.5), dropout=0.5).train()
    model.get_base_model().blocks[1].eval()
    model.get_base_model().norm.weight.requires_grad_(True)
    for parameter in factors(model).values():
        parameter.grad = torch.ones_like(parameter)
        break
    return model


def test_everything_is_given_back_and_dropout_is_off():
    model = awkward_model()
    base = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}
    before = snapshot(model)
    report = match(model)
    assert snapshot(model) == before
    assert report.before.match == 1 and report.loss_per_step[0] < report.before.loss * 1.5
    assert same(base, {n: p.detach() for n, p in model.named_parameters() if "lora_" not in n})


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("call", [0, 3])
def test_everything_is_given_back_after_an_error(error, call):
    model = awkward_model()
    add_lora(model, adapter_name="tuned", targets="mlp")
    before, start = snapshot(model), values(model)
    calls = iter(range(100))

    def forward(model, batch):
        if next(calls) == call:
            np.random.rand(), random.random(), torch.rand(1)
            raise error
        return model(batch)

    with pytest.raises(error):
        match(model, forward_fn=forward, reference="tuned")
    assert snapshot(model) == before and same(values(model), start)


# Precision, checkpointing, compilation


@pytest.mark.parametrize("merged", [False, True])
def test_autocast_of_the_caller(merged):
    """Casts that autocast keeps must not outlive an optimiser step: the loss would never move."""
    results = {}
    for enabled in (False, True):
        torch.manual_seed(0)
        model = randomise(add_lora(build_vit(), merged_linear=merged), 0.5)
        with torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=enabled):
            results[enabled] = match(model, [images(8)], ABMConfig(steps=20, samples=8, learning_rate=3e-3))
    assert results[True].after.loss < 0.8 * results[True].before.loss
    assert results[True].loss_per_step == pytest.approx(results[False].loss_per_step, rel=0.15)


def test_bfloat16_model():
    model = add_lora(build_vit().bfloat16())
    report = match(model, [images(4).bfloat16()])
    assert report.before.match == 1 and all(p.dtype == torch.float32 for p in factors(model).values())


def test_gradient_checkpointing_of_timm_changes_nothing():
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_lora(build_vit())
        model.get_base_model().set_grad_checkpointing(checkpointing)
        match(model)
        results.append(values(model))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=name)


def test_checkpointed_blocks_are_left_as_torch_wants(monkeypatch):
    """An exception out of such a block leaves torch's hooks in place for as long as it is held (torch before 2.14)."""
    with_gradient = []
    monkeypatch.setattr(hooks._AllRecorded, "__init__", lambda self: with_gradient.append(torch.is_grad_enabled()))
    model = add_lora(build_vit())
    model.get_base_model().set_grad_checkpointing(True)
    match(model)
    assert not any(with_gradient)
    match(add_lora(build_vit()))
    assert any(with_gradient)  # elsewhere nothing above the last boundary runs


def test_reentrant_checkpointing_is_refused_by_name():
    model = add_lora(build_vit())
    block = model.get_base_model().blocks
    inner = block.forward

    def reentrant(x, *args, **kwargs):
        return torch.utils.checkpoint.checkpoint(lambda x: inner(x, *args, **kwargs), x, use_reentrant=True)

    block.forward = reentrant
    with pytest.raises(ValueError, match="'use_reentrant': False"), pytest.warns(UserWarning, match="requires_grad"):
        match(model)


def test_compile_comes_afterwards():
    model = add_lora(build_vit())
    with pytest.raises(ValueError, match="compiled: call torch.compile last"):
        match(torch.compile(model, backend="eager"))
    model.get_base_model().blocks[2].compile(backend="eager")
    with pytest.raises(ValueError, match=r"base_model\.model\.blocks\.2 is compiled"):
        match(model)


@pytest.mark.slow
def test_compiled_afterwards_it_computes_the_same():
    model = add_lora(build_vit()).eval()
    match(model)
    expected = model(images())
    torch.testing.assert_close(torch.compile(model, backend="eager")(images()), expected)


def test_hooks_set_before_wrapping_still_fire():
    vit = build_vit()
    fired = []
    vit.blocks[0].mlp.fc1.register_forward_hook(lambda *_: fired.append("fc1"))
    vit.blocks[0].mlp.act.register_forward_hook(lambda *_: fired.append("act"))
    report = match(add_lora(vit))
    assert {"fc1", "act"} == set(fired) and report.before.match == 1


# Refused, each by name


def test_bare_model():
    with pytest.raises(ValueError, match="VisionTransformer is no PeftModel: call add_lora first"):
        match(build_vit())


def test_adapter_that_does_not_exist_or_is_not_active():
    model = add_lora(build_vit())
    add_lora(model, adapter_name="second")
    with pytest.raises(ValueError, match="no adapter 'third'; the model has 'default', 'second'"):
        match(model, adapter_name="third")
    with pytest.raises(ValueError, match=r"active adapters are \['default'\].*set_adapter\('second'\)"):
        match(model, adapter_name="second")
    headless = add_lora(add_lora(build_vit(num_classes=0)), adapter_name="second")
    headless.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match=r"exactly 'default' is wanted"):
        match(headless)


def test_reference_that_does_not_exist():
    model = add_lora(build_vit())
    for reference in ("tuned", "default"):
        with pytest.raises(ValueError, match=rf"'{reference}' is neither 'pretrained' nor .* other adapters \[\]"):
            match(model, reference=reference)


def test_reference_with_other_modules():
    with pytest.raises(ValueError, match=r"reference VisionTransformer has no modules blocks\.5\.mlp\.act$"):
        match(add_lora(build_vit()), reference=build_vit(depth=5))


def test_frozen_merged_and_foreign_adapters():
    model = add_lora(build_vit())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is merged .*unmerge_adapter"):
        match(model)
    model.unmerge_adapter()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="is frozen: load it with is_trainable=True"):
        match(model)
    ia3 = get_peft_model(build_vit(), IA3Config(target_modules=["mlp.fc1"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="is IA3, not LoRA"):
        match(ia3)


def test_replaced_head():
    model = add_lora(build_vit())
    model.get_base_model().reset_classifier(3)
    with pytest.raises(ValueError, match="'head' was replaced"):
        match(model)


def test_empty_loader():
    with pytest.raises(ValueError, match="the dataloader is empty"):
        match(add_lora(build_vit()), [])


@pytest.mark.parametrize(
    "batch, message",
    [
        (images(2)[:, :1], r"batch \(Tensor with float32 \(2, 1, 32, 32\)\).*forward_fn=lambda"),
        ({"pictures": images(2)}, r"no images among the batch\\?'s keys .*pictures.*forward_fn=lambda"),
        ("picture.png", "of type str holds no tensor"),
    ],
)
def test_batch_that_the_model_cannot_take(batch, message):
    with pytest.raises(ValueError, match=message):
        match(add_lora(build_vit()), [batch])


def test_boundary_that_never_fires():
    model = add_lora(build_vit())

    def part(model, batch):
        return model.get_base_model().forward_intermediates(batch, [3], stop_early=True)

    with pytest.raises(ValueError, match=r"never fired: blocks\.4\.mlp\.act, blocks\.5\.mlp\.act\."):
        match(model, forward_fn=part)


def test_nothing_that_depends_on_the_adapter():
    model = add_lora(build_vit(), targets=["blocks.5.mlp.fc2"])
    with pytest.raises(ValueError, match="every adapted layer lies behind the matched boundaries"):
        match(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activation_that_is_not_finite(value):
    model = add_lora(build_vit())
    with torch.no_grad():
        model.get_base_model().blocks[0].norm2.bias[3] = value
    with pytest.raises(ValueError, match=r"reference's pre-activation at blocks\.0\.mlp\.act is NaN or infinite"):
        match(model)
    model = add_lora(build_vit())
    with torch.no_grad():
        factors(model)["base_model.model.blocks.2.mlp.fc1.lora_B.default.weight"].fill_(value)
    with pytest.raises(ValueError, match=r"adapted model's pre-activation at blocks\.2\.mlp\.act is NaN or infinite"):
        match(model)


def test_loss_that_explodes():
    model = add_lora(build_vit())
    start = values(model)
    with pytest.raises(ValueError, match=r"loss is not finite at step \d+, in blocks.*; lower learning_rate"):
        match(model, config=replace(FAST, learning_rate=1e30, steps=10))
    assert same(values(model), start)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("margin", -0.1, "margin is -0.1; it must be a finite number of 0 or more"),
        ("margin", float("nan"), "margin is nan"),
        ("margin_unit", "percent", "allowed are 'absolute', 'relative'"),
        ("steps", 0, "steps is 0; it must be a whole number of 1 or more"),
        ("samples", -1, "samples is -1"),
        ("batch_size", 0, "batch_size is 0; it must be a whole number of 1 or more"),
        ("learning_rate", 0.0, "learning_rate is 0.0; it must be a finite number above 0"),
        ("learning_rate", "a", "learning_rate is 'a'; it must be a finite number above 0"),
        ("margin", None, "margin is None; it must be a finite number of 0 or more"),
        ("layers", 0, "layers is 0"),
        ("layers", "last", "'last'; allowed are 'all', a number of last layers"),
        ("layer_weights", "cubic", "allowed are 'quadratic', 'uniform'"),
    ],
)
def test_config_out_of_range(field, value, message):
    with pytest.raises(ValueError, match=message):
        ABMConfig(**{field: value})


@pytest.mark.parametrize(
    "layers, message",
    [
        (7, "layers is 7, but stack 'blocks' has only 6 boundaries"),
        (["blocks.9.mlp.act"], r"names blocks\.9\.mlp\.act; the boundaries of this model are blocks\.0\.mlp\.act"),
        ([], "names an empty list"),
    ],
)
def test_layers_that_the_model_does_not_have(layers, message):
    with pytest.raises(ValueError, match=message):
        match(add_lora(build_vit()), config=replace(FAST, layers=layers))


# The report


def test_report_prints_and_is_plain_json():
    report = match(add_lora(build_vit()))
    text = str(report)
    assert text.count("\n") == 8 and "6 layers matched to pretrained in 3 steps, 8 of 8 samples" in text
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["config"]["steps"] == 3 and len(content["layers"]) == 6
    assert content["layers"][0]["before"] == {
        "loss": report.layers[0].before.loss,
        "match": 1.0,
        "inside": report.layers[0].before.inside,
    }


def test_gradients_do_not_vanish_in_float16():
    """The mean over all units sends a gradient below float16's smallest number; the loss is scaled for it."""
    norms = {}
    for dtype in (torch.bfloat16, torch.float16):
        model = add_lora(build_vit(mlp_ratio=16))
        with torch.autocast(torch.get_default_device().type, dtype):
            match(model, [images(64)], replace(FAST, batch_size=64, steps=1))
        moved = [p for n, p in factors(model).items() if "lora_B" in n]
        norms[dtype] = [b.count_nonzero().item() / b.numel() for b in moved if b.any()]
    assert len(norms[torch.float16]) == len(norms[torch.bfloat16])
    assert min(norms[torch.float16]) > 0.95 * min(norms[torch.bfloat16])


def test_before_is_of_the_model_as_it_is():
    """A module that is saved with the adapter and was trained makes another model, though B is zero."""
    model = get_peft_model(
        build_vit(), LoraConfig(target_modules=["mlp.fc1"], modules_to_save=["blocks.5.norm2", "head"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and "norm2" in name:
                parameter.add_(torch.randn_like(parameter))
    report = match(model, config=replace(FAST, steps=1, learning_rate=1e-12))
    assert report.before.match < 0.999
    assert report.before.match == pytest.approx(report.after.match, abs=1e-4)


@pytest.mark.parametrize("layers", [np.int64(2), {"blocks.1.mlp.act"}, ("blocks.1.mlp.act",)])
def test_layers_of_any_kind_can_be_written(layers):
    report = match(add_lora(build_vit()), config=replace(FAST, layers=layers))
    assert len(report.layers) == (2 if isinstance(layers, np.int64) else 1)
    report.to_dict()


def test_one_line_says_what_a_user_should_know():
    report = match(add_lora(build_vit()))
    seen = re.fullmatch(
        r"8 samples, 3 steps, \d+\.\d s: (\S+) % (fewer|more) units inside the margin, (\S+) % keep their side.*",
        report.summary(),
    )
    change = 100 * (1 - report.after.inside / report.before.inside)
    assert float(seen[1]) == pytest.approx(abs(change), abs=0.06) and (seen[2] == "fewer") == (change >= 0)
    assert float(seen[3]) == pytest.approx(100 * report.after.match, abs=0.06)


def test_progress_bar_can_be_switched_off(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # somebody watches
    initialize_lora_abm_weights(add_lora(build_vit()), [images(4)], FAST)
    assert "ABM: 100%" in capsys.readouterr().err
    match(add_lora(build_vit()))
    assert capsys.readouterr() == ("", "")


# The loss never ends above where it began


@pytest.mark.slow
@pytest.mark.parametrize("task", [row.name for row in vtab_tasks.TASKS.values() if rendered.can_draw(row)])
def test_the_loss_never_ends_above_on_any_rendered_task(task, device, tmp_path_factory, monkeypatch):
    """By the report and by two models side by side, at the defaults and at a rate at which the steps lead upwards."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "rendered"))
    data = vtab_tasks.load(task, "train800val200", source="rendered").subset(40, 0)
    pixels = [F.interpolate(torch.from_numpy(image).movedim(2, 0)[None].float(), (32, 32)) for image, _ in data]
    batches = (torch.cat(pixels).to(device) / 127.5 - 1).split(20)
    pretrained = build_vit().eval()
    for seed, rate, half in itertools.product(range(2), (3e-4, 0.1), (False, True)):
        torch.manual_seed(seed)
        model = add_lora(copy.deepcopy(pretrained))
        with torch.autocast(device, torch.bfloat16, enabled=half):
            report = match(model, batches, ABMConfig(seed=seed, learning_rate=rate))
        assert report.after.loss <= report.before.loss
        if not half:
            weights = torch.tensor([layer.weight for layer in report.layers], dtype=torch.float64)
            seen = [torch.cat(batches)[: report.samples]]
            before = figures(pretrained, pretrained, seen, 0.5)[:, 0] @ weights
            assert figures(model, pretrained, seen, 0.5)[:, 0] @ weights <= before * (1 + 1e-6)
