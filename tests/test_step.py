"""`TrainingStep` without a GPU: eager steps, refusals, and how it sees that a model has been changed."""

import copy
import random
import re
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_vit, images, randomise
from graphs import emulate
from helpers import refused
from torch import nn

from abm_vision import TrainingStep, add_lora
from abm_vision.abm import step as module
from abm_vision.abm.snapshot import Snapshot, generator_of, why_eager, why_not_copied
from abm_vision.abm.step import _leaves


def adapted():
    return randomise(add_lora(build_vit(), rank=4, alpha=8), 0.1).train()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["auto", "eager"])
def test_loss_and_gradients_are_those_of_a_plain_loop(mode):
    model, lines = adapted(), []
    batches = [(images(4, seed=k), torch.arange(4) % 5) for k in range(2)]
    step = TrainingStep(model, cross_entropy, mode, say=lines.append)
    losses = [step(batch) for batch in batches]
    found = gradients(model)
    model.zero_grad()
    expected = [cross_entropy(model, batch) for batch in batches]
    sum(expected).backward()
    assert torch.equal(torch.stack(losses), torch.stack(expected).detach()) and not losses[0].requires_grad
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)
    assert not step.captured and not lines  # on a CPU nothing is to be said


def test_of_several_losses_the_mean_is_differentiated():
    model, batch = adapted(), (images(4), torch.arange(4) % 5)
    losses = TrainingStep(model, lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))(batch)
    found = gradients(model)
    model.zero_grad()
    cross_entropy(model, batch).backward()
    assert losses.shape == (4,)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(found[name], gradient)


def test_refusals():
    with pytest.raises(ValueError, match="mode is 'fast'; allowed are 'auto', 'eager', 'graph'"):
        TrainingStep(adapted(), cross_entropy, "fast")
    with pytest.raises(ValueError, match="not on a CUDA device; use mode 'auto' or 'eager'"):
        TrainingStep(adapted(), cross_entropy, "graph")


def test_command_refuses_a_graph_on_a_cpu(capsys, tmp_path):
    words = [w for k, v in {**TINY, "step": "graph"}.items() for w in (f"--{k.replace('_', '-')}", v)]
    assert "step is 'graph', but the device is cpu" in refused([*words, "--out", tmp_path, "--quiet"], capsys)


def rewrap(module):
    """Another Parameter on the same memory: gradients would go to the old one."""
    module.weight = nn.Parameter(module.weight.detach())


CHANGES = {
    "training of": lambda model: model.eval(),
    "merged_adapters of": lambda model: model.merge_adapter(),
    "_disable_adapters of": lambda model: model.base_model.disable_adapter_layers(),
    "scaling of": lambda model: model.get_base_model().blocks[0].attn.qkv.set_scale("default", 3.0),
    "_forward_hooks of": lambda model: model.get_base_model().blocks[1].register_forward_hook(lambda *_: None),
    "_modules of": lambda model: setattr(model.get_base_model().blocks[1].mlp, "act", nn.ReLU()),
    "weight of": lambda model: setattr(model.get_base_model().norm, "weight", nn.Parameter(torch.ones(64))),
    "(weight|bias) of": lambda model: model.get_base_model().head.requires_grad_(False),
    "grad_checkpointing of": lambda model: model.get_base_model().set_grad_checkpointing(True),
    "offset of": lambda model: model.get_base_model().register_buffer("offset", torch.ones(1)),
    "forward of|an attribute of": lambda model: setattr(model.get_base_model().norm, "forward", lambda x: x),
    "weight of .*head": lambda model: model.get_base_model().head.modules_to_save.default.weight.register_hook(print),
    "norm of|weight of": lambda model: rewrap(model.get_base_model().norm),
    "widths of": lambda model: model.get_base_model().widths["mlp"].append(3),
    "p of": lambda model: setattr(model.get_base_model().blocks[0].attn.proj_drop, "p", 0.3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_snapshot_sees_what_would_make_a_graph_wrong(what):
    model = adapted()
    model.get_base_model().register_buffer("offset", torch.zeros(1))
    model.get_base_model().widths = {"mlp": [1, 2]}
    snapshot = Snapshot(model, cross_entropy)
    CHANGES[what](model)
    assert re.match(what, snapshot.changed())


def test_snapshot_bears_what_leaves_a_graph_right():
    model = adapted()
    snapshot, batch = Snapshot(model, cross_entropy), (images(4), torch.arange(4) % 5)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    cross_entropy(model, batch).backward()
    optimiser.step()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    with model.disable_adapter():
        model(batch[0])
    model.eval()(batch[0])
    model.train().merge_adapter()
    model.unmerge_adapter()
    assert snapshot.changed() is None


def test_what_a_loss_trains_is_found():
    model, outside = adapted(), nn.Parameter(torch.ones(()))
    loss = cross_entropy(model, (images(4), torch.arange(4) % 5))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(leaf) for leaf in _leaves(loss)} == trained
    assert {id(leaf) for leaf in _leaves(loss * outside)} == trained | {id(outside)}


def test_reasons_for_eager_steps():
    """Found before anything is run; that there is no CUDA device comes first."""
    assert why_eager(adapted(), cross_entropy) == "the model is not on a CUDA device"


def of(weight, teacher, draw):
    """A loss function with values, a module and perhaps a generator from around it, and what changes them."""

    def loss_fn(model, batch):
        noise = draw.random() if draw else 0
        return weight * F.mse_loss(model(batch[0]), teacher(batch[0])) + SCALE * noise

    def change(name):
        nonlocal weight, teacher
        weight, teacher = (0.0, teacher) if name == "weight" else (weight, copy.deepcopy(teacher))

    return loss_fn, change


SCALE = 1.0


@pytest.mark.parametrize("name", ["weight", "teacher", "SCALE", "training of", "weight of norm"])
def test_snapshot_sees_what_the_loss_function_names(name, monkeypatch):
    teacher = build_vit()
    loss_fn, change = of(1.0, teacher, None)
    snapshot = Snapshot(adapted(), loss_fn)
    loss_fn(adapted(), (images(2),))
    assert snapshot.changed() is None
    if name == "SCALE":
        monkeypatch.setitem(globals(), "SCALE", 0.5)
    elif name == "training of":
        teacher.train(not teacher.training)
    elif name == "weight of norm":
        teacher.norm.weight.data = teacher.norm.weight.data.clone()  # as .cpu() and .cuda() do
    else:
        change(name)
    assert snapshot.changed() == f"{name} of the loss function" or snapshot.changed().startswith(name)


@pytest.mark.parametrize("draw", [np.random.default_rng(0), random.Random(0)])
def test_a_generator_of_the_loss_function_is_a_reason(draw):
    assert generator_of(of(1.0, build_vit(), draw)[0]).startswith("the loss function draws from draw")
    assert generator_of(of(1.0, build_vit(), None)[0]) is None


def test_what_a_batch_must_not_hold():
    cpu, encoded = torch.device("cpu"), nn.Linear(2, 2)(torch.ones(1, 2))
    assert why_not_copied(torch.ones(1), cpu) is None and why_not_copied(0.5, cpu) is None
    assert "asks for a gradient" in why_not_copied(encoded, cpu)
    assert "asks for a gradient" in why_not_copied(torch.ones(1, requires_grad=True), cpu)
    assert "a batch holds a tensor on meta" in why_not_copied(torch.ones(1, device="meta"), cpu)
    assert "a batch holds a object" in why_not_copied(object(), cpu)


def test_after_a_capture_that_fails(monkeypatch):
    """Nothing of it is in memory while the step runs eagerly; what was captured before is kept."""
    monkeypatch.setattr(module, "why_eager", lambda *_: None)
    alive, lines = [], []

    def capture(self, key, batch):
        activation = torch.ones(4)
        alive.append(weakref.ref(activation))
        if len(batch[0]) < 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried ...\nmore")
        self._captured[key], self._snapshot = Captured(), Snapshot(self._model, self._loss_fn)

    class Captured:
        def replay(self, leaves):
            return torch.tensor(7.0)

    def loss_fn(model, batch):
        assert not any(ref() is not None for ref in alive)
        return cross_entropy(model, batch)

    monkeypatch.setattr(TrainingStep, "_capture", capture)
    step = TrainingStep(adapted(), loss_fn, say=lines.append)
    whole, last = [(images(n), torch.arange(n) % 5) for n in (4, 2)]
    losses = [step(batch) for _ in range(4) for batch in (whole, last)]
    assert losses[-2] == 7 and losses[-1] != 7 and step.captured == 1 and len(alive) == 2
    assert lines == ["steps run eagerly, not as a CUDA graph: CUDA out of memory. Tried ..."]
    alone = TrainingStep(adapted(), loss_fn, say=lines.append)
    for _ in range(4):
        alone(last)
    assert len(alive) == 3 and len(lines) == 2  # it is not tried again
    with pytest.raises(ValueError, match="cannot be captured as a CUDA graph: CUDA out of memory"):
        strict = TrainingStep(adapted(), loss_fn, "graph")
        for _ in range(3):
            strict(last)


# Graphs emulated on the CPU: whatever happens around a graph, "auto" gives what eager steps give, exactly


class Scaled(nn.Module):
    """A small model with a setting, a buffer that moves, and dropout."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.settings = {"scale": [1.0]}

    def forward(self, x):
        return self.settings["scale"][0] * self.layers(x)


class World:
    """A model, what a loss function has around it, and a loop that changes something before step 5."""

    def __init__(self, mode):
        torch.manual_seed(0)
        self.model, self.encoder, self.teacher = Scaled(), nn.Linear(6, 6), nn.Linear(6, 3)
        self.inputs, self.lines, self.mode = [], [], mode

    def losses(self, kind):
        weight, teacher, draw = 1.0, self.teacher, np.random.default_rng(0)

        def plain(model, batch):
            return F.cross_entropy(model(batch[0]), batch[1])

        def annealed(model, batch):
            return weight * F.cross_entropy(model(batch[0]), batch[1])

        def distilled(model, batch):
            return F.mse_loss(model(batch[0]), teacher(batch[0]).detach())

        def drawn(model, batch):
            return draw.random() * F.cross_entropy(model(batch[0]), batch[1])

        def waiting(model, batch):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            return loss if loss.item() < 100 else loss / 2

        functions = {"annealed": annealed, "teacher": distilled, "teacher moved": distilled, "drawn": drawn}
        loss_fn = {**functions, "waiting": waiting}.get(kind, plain)
        step = TrainingStep(self.model, loss_fn, self.mode, say=self.lines.append)
        optimiser, found = torch.optim.SGD(self.model.parameters(), 0.1), []
        for k in range(9):
            generator = torch.Generator().manual_seed(k)
            count = 3 if kind == "last batch" and k % 2 else 4
            x, y = torch.randn(count, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)
            if k == 5:
                weight = 0.0
                optimiser = self.change(kind) or optimiser
                teacher = self.teacher
            x = self.encoder(x) if kind == "encoder" else x.requires_grad_(kind == "input")
            self.encoder.zero_grad()
            found.append(step((x, y)))
            if kind != "accumulated" or k % 2:
                optimiser.step()
                optimiser.zero_grad()
            self.inputs += [t.grad.clone() for t in (x, self.encoder.weight) if t.is_leaf and t.grad is not None]
        return torch.stack(found), step.captured

    def change(self, kind):
        linear = self.model.layers[0]
        if kind == "setting":
            self.model.settings["scale"][0] = 0.5
        elif kind == "teacher":
            self.teacher = nn.Linear(6, 3)
        elif kind == "teacher moved":
            self.teacher.weight.data = torch.zeros_like(self.teacher.weight)
        elif kind == "evaluation":
            self.model.eval()
        elif kind == "frozen":
            linear.requires_grad_(False)
        elif kind == "wrapped":
            linear.weight = nn.Parameter(linear.weight.detach())
            return torch.optim.SGD(self.model.parameters(), 0.1)
        return None


KINDS = {
    **dict.fromkeys(["plain", "accumulated", "annealed", "teacher", "teacher moved", "setting", "evaluation"], 1),
    **{"frozen": 1, "wrapped": 1, "last batch": 2, "drawn": 0, "waiting": 0, "encoder": 0, "input": 0},
}


@pytest.mark.parametrize("kind", KINDS)
def test_auto_is_eager_whatever_happens(kind, monkeypatch):
    emulate(monkeypatch)
    found = []
    for mode in ("eager", "auto"):
        world = World(mode)
        losses, captured = world.losses(kind)
        found.append([losses, torch.rand(2), *world.inputs, *world.model.state_dict().values()])
    assert captured == KINDS[kind] and len(world.lines) == (captured == 0), world.lines
    for here, there in zip(*found, strict=True):
        assert torch.equal(here, there)
