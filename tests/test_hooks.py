"""Recording pre-activations: the right tensors, and nothing left behind."""

import pytest
import torch
from conftest import build_vit, images
from torch import nn

from abm_vision.abm.hooks import preactivations, record_preactivations

pytestmark = pytest.mark.usefixtures("device")


def forward(model, batch):
    return model(batch)


def acts(vit):
    return [f"blocks.{i}.mlp.act" for i in range(len(vit.blocks))]


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_what_goes_into_the_activation_is_the_output_of_fc1(vit):
    outputs = {}
    for name in acts(vit):
        layer = name.replace("act", "fc1")
        vit.get_submodule(layer).register_forward_hook(lambda m, a, out, name=name: outputs.update({name: out}))
    recorded = preactivations(vit, images(), acts(vit), forward)
    assert list(recorded) == acts(vit)
    for name, z in recorded.items():
        assert torch.equal(z, outputs[name]) and z.requires_grad


def test_nothing_above_the_last_boundary_runs(vit):
    def never(*_):
        raise AssertionError("a layer above the last boundary ran")

    vit.blocks[2].mlp.act.register_forward_hook(never)
    vit.blocks[3].register_forward_pre_hook(never)
    before = hooks(vit)
    recorded = preactivations(vit, images(), acts(vit)[:3], forward)
    assert list(recorded) == acts(vit)[:3] and hooks(vit) == before


def test_hooks_go_away_after_an_error(vit):
    with pytest.raises(ZeroDivisionError), record_preactivations(vit, acts(vit)):
        raise ZeroDivisionError
    assert hooks(vit) == 0


def test_in_place_activation_does_not_overwrite_the_record():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    x = torch.randn(16, 4)
    recorded = preactivations(model, x, ["1"], forward)
    assert torch.equal(recorded["1"], model[0](x)) and (recorded["1"] < 0).any()


def test_boundary_that_never_fires_is_named(vit):
    with pytest.raises(ValueError, match=r"never fired: blocks\.4\.mlp\.act, blocks\.5\.mlp\.act\."):
        preactivations(vit, images(), acts(vit), lambda m, b: m.forward_intermediates(b, [3], stop_early=True))


def test_recomputation_keeps_the_first_capture():
    vit = build_vit().train()
    vit.set_grad_checkpointing()
    with record_preactivations(vit, acts(vit)) as recorded:
        output = vit(images())
    first = dict(recorded)
    output.sum().backward()
    assert all(recorded[n] is first[n] for n in first)
