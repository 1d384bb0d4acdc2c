"""`TrainingStep` without a GPU: eager steps, refusals, and how it sees that a model has been changed."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_vit, images, randomise
from helpers import refused
from torch import nn

from abm_vision import TrainingStep, add_lora
from abm_vision.abm.step import _leaves, _Snapshot, _why_eager


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
    "p of": lambda model: setattr(model.get_base_model().blocks[0].attn.proj_drop, "p", 0.3),
}


@pytest.mark.parametrize("what", CHANGES)
def test_snapshot_sees_what_would_make_a_graph_wrong(what):
    model = adapted()
    model.get_base_model().register_buffer("offset", torch.zeros(1))
    snapshot = _Snapshot(model)
    CHANGES[what](model)
    assert re.match(what, snapshot.changed())


def test_snapshot_bears_what_leaves_a_graph_right():
    model = adapted()
    snapshot, batch = _Snapshot(model), (images(4), torch.arange(4) % 5)
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
    assert _why_eager(adapted()) == "the model is not on a CUDA device"
