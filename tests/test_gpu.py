"""What only a GPU can show: kernels, graphs, random states and memory of CUDA. `pytest -m gpu` runs this part."""

import copy
import gc
import itertools
import math
import random
import subprocess
import sys
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_vit, images, randomise
from helpers import break_off
from torch import nn

from abm_vision import (
    INITIALIZERS,
    ABMConfig,
    TrainingStep,
    add_lora,
    check_adapters,
    information_loss,
    initialize_lora,
    load_adapter,
    save_adapter,
)
from abm_vision.abm import kernels
from abm_vision.initializers import Needs
from abm_vision.vtab import make_config, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
CUDA = "cuda"
HALF = torch.bfloat16


def adapted(merged_linear=True, **options):
    return randomise(add_lora(build_vit(**options).to(CUDA), rank=4, alpha=8, merged_linear=merged_linear), 0.1).train()


def batches(count=48, size=16):
    labels = torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(3))
    return [(x.to(CUDA), y.to(CUDA)) for x, y in zip(images(count).split(size), labels.split(size), strict=True)]


def cross_entropy(model, batch):
    with torch.autocast(CUDA, HALF):
        return F.cross_entropy(model(batch[0]), batch[1])


def optimiser_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def train(model, step, epochs=4, data=None):
    optimiser, losses = optimiser_of(model), []
    for epoch in range(epochs):
        torch.manual_seed(epoch)
        for batch in data or batches():
            losses.append(step(batch))
            optimiser.step()
            optimiser.zero_grad()
    return torch.stack(losses)


# ------------------------------------------------------------------------------------------------------ the kernel


@pytest.mark.parametrize("shape", [(96, 130), (70, 33), (64, 128), (300, 7)])
@pytest.mark.parametrize("rank", [1, 3, 8, 17, kernels.RANKS])
@pytest.mark.parametrize("dtype", kernels.HALF)
def test_kernels_give_what_double_precision_gives(shape, rank, dtype):
    generator = torch.Generator(CUDA).manual_seed(rank)

    def draw(*size):
        return torch.randn(size, generator=generator, device=CUDA)

    def near(found, value, kind=dtype):
        assert found.dtype == kind and (found.double() - value).norm() / value.norm() <= torch.finfo(dtype).eps

    for of_weight, of_factors in ((torch.float32, torch.float32), (dtype, torch.float32), (dtype, dtype)):
        weight, a, b = (
            draw(*shape).to(of_weight),
            draw(rank, shape[1]).to(of_factors),
            draw(shape[0], rank).to(of_factors),
        )
        assert kernels.kernels_fit(weight, a, b, dtype)
        for scaling in (1, 0.7):  # the second time, what was built for the first is called
            near(kernels.merge(weight, a, b, scaling, dtype), weight.double() + scaling * b.double() @ a.double())
    a, b = draw(rank, shape[1]), draw(shape[0], rank)
    # Twice, as what is built is called in another way; x begins at addresses that are multiples of 16, or of 2 alone.
    for tokens, first in itertools.product((1, 100, 3000, 3000), (0, 1)):
        x, grad = draw(tokens, shape[1] + 3).to(dtype)[:, first : shape[1] + first], draw(tokens, shape[0]).to(dtype)
        found = kernels.factor_gradients(x, a, grad, b, 0.7)
        u, v = x.double() @ a.to(dtype).double().T, grad.double() @ b.to(dtype).double()
        near(found[: a.numel()].view_as(a), 0.7 * v.T @ x.double(), torch.float32)
        near(found[a.numel() :].view_as(b), 0.7 * grad.double().T @ u, torch.float32)
        assert torch.equal(found, kernels.factor_gradients(x, a, grad, b, 0.7))  # no order left to chance


def test_no_kernels_for_what_they_cannot_do():
    weight, a, b = (torch.zeros(size, device=CUDA) for size in ((32, 48), (4, 48), (32, 4)))
    assert kernels.kernels_fit(weight, a, b, HALF)
    many = torch.zeros(kernels.RANKS + 1, 48, device=CUDA), torch.zeros(32, kernels.RANKS + 1, device=CUDA)
    for other in (
        (weight, a, b, torch.float32),
        (weight.double(), a, b, HALF),
        (weight.T.contiguous().T, a, b, HALF),
        (weight, *many, HALF),
        (weight.cpu(), a.cpu(), b.cpu(), HALF),
    ):
        assert not kernels.kernels_fit(*other)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 96])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_as_near_to_the_truth_as_pefts(autocast, rank, compiled):
    torch.manual_seed(0)
    found = {}
    for kind in ("truth", "peft", "ours"):
        torch.manual_seed(0)
        bare = build_vit("vit_tiny_patch16_224", depth=2).to(CUDA)
        model = randomise(add_lora(bare, rank=rank, alpha=2 * rank, merged_linear=kind == "ours"), 0.2)
        x = images(64).to(CUDA)
        if kind == "truth":
            model, x = model.double(), x.double()
        elif compiled:
            for block in model.get_base_model().blocks:
                block.compile()
        with torch.autocast(CUDA, autocast or HALF, enabled=bool(autocast) and kind != "truth"):
            out = model(x)
        F.cross_entropy(out if kind == "truth" else out.float(), torch.arange(64, device=CUDA) % 5).backward()
        found[kind] = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    errors = {
        kind: max(float((found[kind][n] - g).norm() / g.norm()) for n, g in found["truth"].items())
        for kind in ("peft", "ours")
    }
    assert errors["ours"] <= max(1.5 * errors["peft"], 1e-5)


# ------------------------------------------------------------------------------------------------------ the graph


def test_graph_gives_the_losses_and_weights_of_eager_steps():
    found = {}
    for mode in ("eager", "graph", "auto"):
        model = adapted(drop_path_rate=0.2, proj_drop_rate=0.1)
        step = TrainingStep(model, cross_entropy, mode)
        losses = train(model, step, data=[*batches(), (images(5, seed=4).to(CUDA), torch.arange(5, device=CUDA))])
        assert step.captured == (0 if mode == "eager" else 2)
        found[mode] = losses, weights(model), torch.rand(3, device=CUDA)
    for mode in ("graph", "auto"):
        for here, there in zip(found[mode], found["eager"], strict=True):
            torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    assert torch.equal(found["graph"][1], found["auto"][1])


def test_gradients_accumulate():
    model = adapted()
    step, (first, second, _) = TrainingStep(model, cross_entropy, "graph"), batches()
    for _ in range(3):
        step(first)
        model.zero_grad()
    step(first)
    step(second)
    found = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for batch in (first, second):
        cross_entropy(model, batch).backward()
    for here, there in zip(found, (p.grad for p in model.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-2, atol=1e-5)


def test_adapter_is_saved_merged_and_exported_as_after_eager_steps(tmp_path):
    model = adapted()
    step = TrainingStep(model, cross_entropy, "graph")
    train(model, step)
    x = images(4).to(CUDA)
    expected = model.eval()(x).detach()
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(build_vit().to(CUDA), tmp_path).eval()(x), expected)
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    before = weights(model.train())
    train(model, step, epochs=1)
    assert step.captured and not torch.equal(weights(model), before)
    merged = copy.deepcopy(model).merge_and_unload().eval()
    torch.testing.assert_close(merged(x), model.eval()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.eval(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.add_adapter("other", copy.deepcopy(model.peft_config["default"])),
        lambda model: model.get_base_model().blocks[0].attn.qkv.set_scale("default", 3.0),
        lambda model: model.get_base_model().blocks[1].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.get_base_model().blocks[1].mlp, "act", nn.ReLU()),
        lambda model: setattr(model.get_base_model().norm, "weight", nn.Parameter(torch.ones(64, device=CUDA))),
        lambda model: model.get_base_model().head.requires_grad_(False),
        lambda model: model.get_base_model().set_grad_checkpointing(True),
    ],
)
def test_what_is_no_longer_what_was_captured_is_an_error(change):
    model = adapted()
    step = TrainingStep(model, cross_entropy, "graph")
    train(model, step, epochs=2)
    change(model)
    with pytest.raises(ValueError, match="is not what was captured: .* has changed"):
        step(batches()[0])


def with_checkpointing(model):
    model.get_base_model().set_grad_checkpointing(True)


def with_a_hook(model):
    model.get_base_model().blocks[0].register_forward_hook(lambda *_: None)


def waits(model, batch):
    return cross_entropy(model, batch) * (1.0 + 0.0 * batch[0].sum().item())


def counts(model, batch):
    model.calls = getattr(model, "calls", 0) + 1
    return cross_entropy(model, batch)


def draws(model, batch):
    return cross_entropy(model, batch) * (1.0 + 0.0 * random.random())


@cache
def outside():
    return nn.Parameter(torch.ones((), device=CUDA))


def trains_another(model, batch):
    return cross_entropy(model, batch) * outside()


def holds(model, batch):
    torch.cuda.synchronize()  # which cannot be captured
    return cross_entropy(model, batch)


@pytest.mark.parametrize(
    "prepare, loss_fn, reason",
    [
        (with_checkpointing, cross_entropy, "gradient checkpointing"),
        (with_a_hook, cross_entropy, "hook on"),
        (lambda model: None, waits, "synchronizing"),
        (lambda model: None, counts, "calls of PeftModel changes"),
        (lambda model: None, holds, ""),
        (lambda model: None, draws, "are drawn from"),
        (lambda model: None, trains_another, "none of the model's"),
    ],
)
def test_auto_runs_eagerly_what_cannot_be_captured_and_says_why(prepare, loss_fn, reason):
    lines, found = [], []
    for mode in ("auto", "eager"):
        model = adapted(drop_path_rate=0.2)
        prepare(model)
        step = TrainingStep(model, loss_fn, mode, say=lines.append)
        found.append((train(model, step), torch.rand(3, device=CUDA)))
        assert not step.captured
    assert len(lines) == 1 and reason in lines[0] and lines[0].startswith("steps run eagerly, not as a CUDA graph")
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=1e-5)
    model = adapted()
    prepare(model)
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph"):
        train(model, TrainingStep(model, loss_fn, "graph"))
    assert torch.rand(3, device=CUDA).numel() == 3  # the generator works


@pytest.mark.parametrize("batch", [lambda: {"x": images(4)}, lambda: [object()], lambda: [torch.ones(())]])
def test_a_batch_that_a_graph_would_not_see_runs_eagerly(batch):
    lines, model = [], adapted()
    step = TrainingStep(model, lambda model, _: model(images(4).to(CUDA)).mean(), say=lines.append)
    for _ in range(6):
        step(batch())
    assert not step.captured and len(lines) == 1 and "a batch holds" in lines[0]
    with pytest.raises(ValueError, match="a batch holds"):
        TrainingStep(model, cross_entropy, "graph")(batch())


def test_auto_captures_a_changed_model_anew():
    model, (batch, *_) = adapted(), batches()
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    step = TrainingStep(model, cross_entropy)
    for adapter in ("default", "other"):
        model.set_adapter(adapter)
        for _ in range(4):
            model.zero_grad()
            loss = step(batch)
        torch.testing.assert_close(loss, cross_entropy(model, batch).detach(), rtol=1e-3, atol=1e-3)
        trained = [n for n, p in model.named_parameters() if "lora_" in n and p.grad is not None]
        assert step.captured == 1 and trained and all(f".{adapter}." in n for n in trained)


def test_running_statistics_are_those_of_eager_steps():
    found = []
    for mode in ("eager", "graph"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(5)).to(CUDA)
        model(images(2).to(CUDA))
        step = TrainingStep(model, cross_entropy, mode)
        train(model, step, epochs=1)
        found.append(dict(model.named_buffers()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_third_shape_runs_eagerly():
    lines, model = [], adapted()
    step = TrainingStep(model, cross_entropy, say=lines.append)
    shapes = [(images(n).to(CUDA), torch.arange(n, device=CUDA) % 5) for n in (16, 12, 7)]
    train(model, step, data=shapes)
    assert step.captured == 2 and len(lines) == 1 and "more than 2 kinds" in lines[0]


def test_graph_of_compiled_blocks_and_learning_rates_that_change():
    found = []
    for compiled in (False, True):
        model = adapted(depth=2)
        if compiled:
            for block in model.get_base_model().blocks:
                block.compile()
        step, optimiser, losses = TrainingStep(model, cross_entropy, "graph"), optimiser_of(model), []
        for k, batch in enumerate(batches() * 3):
            optimiser.param_groups[0]["lr"] = 1e-3 * (k + 1)
            losses.append(step(batch))
            optimiser.step()
            optimiser.zero_grad()
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=0, atol=0.02)


def test_grad_scaler():
    found = []
    for mode in ("eager", "graph"):
        model, scaler, losses = adapted(), torch.amp.GradScaler(CUDA, init_scale=2.0**10), []
        optimiser = optimiser_of(model)

        def loss_fn(model, batch, scaler=scaler):
            with torch.autocast(CUDA, torch.float16):
                return scaler.scale(F.cross_entropy(model(batch[0]), batch[1]))

        step = TrainingStep(model, loss_fn, mode)
        for batch in batches() * 3:
            losses.append(step(batch) / scaler.get_scale())
            scaler.step(optimiser)
            scaler.update()
            optimiser.zero_grad()
        found.append(torch.stack(losses))
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_run_is_resumed_bit_for_bit(mode, tmp_path, monkeypatch):
    config = make_config(**{**TINY, "device": CUDA, "precision": "bf16", "epochs": 3, "drop_path": 0.1, "step": mode})
    whole = run(config, tmp_path / "whole")
    break_off(config, tmp_path / "resumed", monkeypatch)
    resumed = run(config, tmp_path / "resumed")
    assert whole["step"] == resumed["step"] == ("graph" if mode == "auto" else "eager")
    assert whole["loss_per_step"] == resumed["loss_per_step"] and whole["test"] == resumed["test"]


def test_the_command_is_the_first_to_use_the_device(tmp_path):
    words = ["--task", "dsprites_loc", "--out", str(tmp_path), "--init", "kaiming"]
    for name, value in {**TINY, "device": "auto"}.items():
        if not name.startswith("abm_"):
            words += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run([sys.executable, "-m", "abm_vision.vtab", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "cuda" in done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------ initialisations


def on_cpu():
    """Batches as a loader yields them."""
    return [(x.cpu(), y.cpu()) for x, y in batches()]


def given(name, dtype=torch.float32):
    row = INITIALIZERS[name]
    reference = adapted().to(dtype) if Needs.REFERENCE in row.needs else None
    config = ABMConfig(samples=32, steps=6) if row.config is ABMConfig else None
    return {"reference": reference, "config": config, "show_progress_bar": False}


@pytest.mark.parametrize("name", INITIALIZERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_initialisation(name, precision):
    dtype = HALF if precision == "bf16" else torch.float32
    bare = build_vit().to(CUDA, dtype).eval()
    x = images(8).to(CUDA, dtype)
    expected = bare(x).float()
    model = add_lora(bare, rank=4, alpha=8)
    data = [(a.to(dtype), b) for a, b in on_cpu()]
    states = torch.cuda.get_rng_state(), torch.get_rng_state()
    with torch.autocast(CUDA, HALF, enabled=precision == "autocast"):
        initialize_lora(model, name, data, **given(name, dtype))
    assert torch.equal(states[0], torch.cuda.get_rng_state()) and torch.equal(states[1], torch.get_rng_state())
    assert {p.device.type for p in model.parameters()} == {CUDA}
    assert all(p.grad is None for p in model.parameters())
    assert float((model.eval()(x).float() - expected).norm() / expected.norm()) < 0.2
    data = [(x.to(dtype), y) for x, y in batches()]
    step = TrainingStep(model.train(), lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1]))
    assert all(map(math.isfinite, train(model, step, epochs=1, data=data)))


@pytest.mark.parametrize("name", [name for name in INITIALIZERS if Needs.REFERENCE not in INITIALIZERS[name].needs])
def test_memory_is_given_back(name):
    model = add_lora(build_vit().to(CUDA), rank=4, alpha=8)
    initialize_lora(model, name, on_cpu(), **given(name))  # what libraries keep for themselves
    model = add_lora(build_vit().to(CUDA), rank=4, alpha=8)
    gc.collect()
    before = torch.cuda.memory_allocated()
    there = {id(tensor) for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)}
    initialize_lora(model, name, on_cpu(), **given(name))
    left = [t.shape for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.is_cuda and id(t) not in there]
    assert torch.cuda.memory_allocated() - before < 2**20, left


@pytest.mark.parametrize("autocast", [False, True])
def test_matching_by_graph_is_that_of_eager_steps(autocast, monkeypatch):
    from abm_vision.abm import match

    found = []
    for mode in ("eager", "graph"):
        made = []

        def make(model, loss_fn, *_, mode=mode, made=made, **options):
            made.append(TrainingStep(model, loss_fn, mode))
            return made[-1]

        monkeypatch.setattr(match, "TrainingStep", make)
        torch.manual_seed(0)
        model = add_lora(build_vit().to(CUDA), rank=4, alpha=8)
        with torch.autocast(CUDA, HALF, enabled=autocast):
            report = initialize_lora(
                model, "abm", on_cpu(), config=ABMConfig(samples=48, steps=12), show_progress_bar=False
            )
        assert made[0].captured == (mode == "graph")
        found.append((torch.tensor(report.loss_per_step), weights(model)))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-5)


def test_matching_waits_for_the_device_a_few_times_only():
    counted = []
    for steps in (4, 8, 16):  # libraries wait in the first one
        model = add_lora(build_vit().to(CUDA), rank=4, alpha=8)
        with pytest.warns(UserWarning) as warned:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                initialize_lora(model, "abm", on_cpu(), config=ABMConfig(steps=steps), show_progress_bar=False)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        counted.append(len([w for w in warned if "synchroniz" in str(w.message)]))
    assert counted[1] == counted[2] < 100, counted


def test_step_does_not_wait_for_the_device():
    model = adapted()
    optimiser, batch = optimiser_of(model), batches()[0]
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            cross_entropy(model, batch).backward()
            optimiser.step()
            optimiser.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_batches_of_a_loader_are_moved_by_every_verb():
    model = adapted()
    assert information_loss(model, on_cpu()).samples == 48
    check_adapters(model, on_cpu()[0])


def test_reference_on_another_device():
    reference = randomise(add_lora(build_vit(), rank=4))
    model = add_lora(build_vit().to(CUDA), rank=4)
    report = initialize_lora(model, "abm_tuned", on_cpu(), reference=reference, show_progress_bar=False)
    assert report.samples == 48 and {p.device.type for p in reference.parameters()} == {"cpu"}


def test_matching_with_gradient_checkpointing():
    model = add_lora(build_vit().to(CUDA), rank=4)
    model.get_base_model().set_grad_checkpointing(True)
    initialize_lora(model.train(), "abm", on_cpu(), show_progress_bar=False)
    F.cross_entropy(model(batches()[0][0]), batches()[0][1]).backward()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_distributed(how):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("nccl", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()
        plain = copy.deepcopy(model)
        expected = train(plain, TrainingStep(plain, cross_entropy, "eager"), epochs=2)
        if how == "ddp":
            wrapped = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.get_base_model().blocks:
                fully_shard(block)
            wrapped = fully_shard(model)
        lines = []
        found = train(wrapped, TrainingStep(wrapped, cross_entropy, say=lines.append), epochs=2)
        assert len(lines) == 1
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)
    finally:
        distributed.destroy_process_group()
