"""Every verb in every state of an adapter: the right value or a ValueError, as the table of docs/states.md says."""

import copy
import random
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import accelerate
import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images, randomise
from helpers import _alive, changes, output, raw, snapshot
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch.func import functional_call

import abm_vision
from abm_vision import INITIALIZERS, ABMConfig, AlignConfig, add_lora, initialize_lora, load_adapter, save_adapter
from abm_vision.initializers import InitConfig

PAGE = Path(__file__).parent.parent / "docs" / "states.md"
TARGETS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
X, Y = images(8), torch.arange(8) % 5
SCALE = 2.0  # alpha / r of every adapter here
ABM, ALIGN = ABMConfig(steps=3, samples=8, batch_size=4), AlignConfig(samples=8, match=0.9)
SETTINGS = {ABMConfig: ABM, AlignConfig: ALIGN, InitConfig: InitConfig(samples=8)}
CHANGES_BASE = ("pissa", "lora_ga")


# ------------------------------------------------------------------------------------------------------------ by hand


_small_vit = cache(helpers.small_vit)


def small_vit():
    return copy.deepcopy(_small_vit())


@cache
def untouched():
    return {name: value.double() for name, value in _small_vit().state_dict().items()}


def weights(model, *adapters):
    """What a plain timm model must hold to compute what these adapters stand for, in float64: W0 + s B A."""
    plain = dict(untouched())
    for name, module in model.named_modules():
        name = name.replace("base_model.model.", "").replace("_orig_mod.", "")
        if isinstance(module, LoraLayer):
            plain[f"{name}.weight"] = module.base_layer.weight.detach().double()
            for adapter in set(adapters) & set(module.lora_A):
                a, b = (f[adapter].weight.detach().double() for f in (module.lora_A, module.lora_B))
                plain[f"{name}.weight"] = plain[f"{name}.weight"] + SCALE * b @ a
        for adapter in adapters:
            if name == f"head.modules_to_save.{adapter}":
                plain.update({f"head.{n}": p.detach().double() for n, p in module.named_parameters()})
    return plain


def plain_output(state):
    return functional_call(_small_vit(), state, X.double())


def gradients(state):
    """G of every adapted layer, of the plain model."""
    names = [f"{n}.weight" for n, _ in _small_vit().named_modules() if n.endswith(tuple(TARGETS))]
    state = {name: value.clone().requires_grad_(name in names) for name, value in state.items()}
    found = torch.autograd.grad(F.cross_entropy(plain_output(state), Y), [state[name] for name in names])
    return {name.removesuffix(".weight"): gradient for name, gradient in zip(names, found, strict=True)}


def lost(gradient, a, b):
    """The share of G that no B dA + dB A reaches, by least squares over every entry of dA and dB."""
    eye = torch.eye
    steps = torch.cat([torch.kron(b, eye(a.shape[1]).double()), torch.kron(eye(len(b)).double(), a.T.contiguous())], 1)
    g = gradient.flatten()
    onto = steps.T @ g
    reached = onto @ torch.linalg.pinv(steps.T @ steps, rtol=1e-10, hermitian=True) @ onto
    return 1 - (reached / g.square().sum()).item()


_losses = {}


def information_lost(state):
    """Layer to information loss of the adapter "default"."""
    key = b"".join(raw(value) for value in [*state.stands["default"].values(), *sum(state.factors.values(), ())])
    if key not in _losses:
        found = gradients(state.stands["default"])
        _losses[key] = {name: lost(found[name], a, b) for name, (a, b) in state.factors.items()}
    return _losses[key]


def lora_layers(model):
    modules = model.named_modules()
    return {n.replace("base_model.model.", ""): m for n, m in modules if isinstance(m, LoraLayer)}


def pair(layer):
    """A and B of "default"."""
    return tuple(factors["default"].weight.detach().double() for factors in (layer.lora_A, layer.lora_B))


# ------------------------------------------------------------------------------------------------------------- states


@dataclass
class State:
    """A model, and what it and the files of its adapters must compute.

    Args:
        model: as a user holds it.
        stands: adapter to the weights of a plain model that does what the adapter stands for.
        factors: layer to A and B of "default".
        shows: those of a plain model that does what `model` does now.
    """

    model: torch.nn.Module
    stands: dict[str, dict[str, torch.Tensor]]
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    shows: dict[str, torch.Tensor]
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    device: str = "cpu"
    stack: ExitStack = field(default_factory=ExitStack)

    @property
    def x(self):
        return X.to(self.device, self.dtype)


@cache
def _adapted(trained):
    torch.manual_seed(1)
    model = add_lora(small_vit(), 4, 8).eval()
    return train(model) if trained else model


def train(model, adapter="default"):
    """Random factors and another head."""
    randomise(model, adapter=adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"head.modules_to_save.{adapter}" in name:
                parameter.add_(0.5 * torch.sin(torch.arange(parameter.numel()).view_as(parameter)))
    return model


def bare(model):
    return model.get_base_model()


def adapted(trained):
    """An adapter, one block in training mode, and gradients of somebody's."""
    model = copy.deepcopy(_adapted(trained))
    bare(model).blocks[0].train()
    for parameter in bare(model).head.parameters():
        parameter.grad = torch.ones_like(parameter)
    return model


def plain(model, *active, **options):
    active = active or ("default",)
    factors = {name: pair(layer) for name, layer in lora_layers(model).items()}
    stands = {name: weights(model, name) for name in model.peft_config}
    return State(model, stands, factors, weights(model, *active), **options)


def fresh(trained, folder):
    return plain(adapted(False))


def initialised(trained, folder):
    model = adapted(False)
    initialize_lora(model, "random_b")
    return plain(model)


def trained(trained, folder):
    return plain(adapted(True))


def merged(trained, folder):
    state = plain(adapted(trained))
    state.model.merge_adapter()
    return state


def switched_off(trained, folder):
    state = plain(adapted(trained))
    state.model.base_model.disable_adapter_layers()
    state.shows = dict(untouched())
    return state


def inside(trained, folder):
    state = plain(adapted(trained))
    state.stack.enter_context(state.model.disable_adapter())
    state.shows = dict(untouched())
    return state


def frozen(trained, folder):
    state = plain(adapted(trained))
    for name, parameter in state.model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
    return state


def head_frozen(trained, folder):
    state = plain(adapted(trained))
    bare(state.model).head.requires_grad_(False)
    return state


def head_replaced(trained, folder):
    state = plain(adapted(trained))
    bare(state.model).reset_classifier(5)
    state.shows.update({f"head.{n}": p.detach().double() for n, p in bare(state.model).head.named_parameters()})
    return state


def compiled(trained, folder):
    state = plain(adapted(trained))
    state.model = torch.compile(state.model, backend="eager")
    return state


def compiled_in_place(trained, folder):
    state = plain(adapted(trained))
    state.model.compile(backend="eager")
    return state


def block_compiled(trained, folder):
    state = plain(adapted(trained))
    bare(state.model).blocks[1] = torch.compile(bare(state.model).blocks[1], backend="eager")
    return state


def second_beside(trained, folder):
    model = adapted(trained)
    add_lora(model, 2, 4, adapter_name="second")
    bare(model).blocks.eval()[0].train()
    return plain(train(model, "second"))


def two_active(trained, folder):
    model = adapted(trained)
    add_lora(model, 2, 4, adapter_name="second", modules_to_save=[])  # peft allows one head alone
    train(model, "second").base_model.set_adapter(["default", "second"])
    return plain(model, "default", "second")


def changed_the_base(trained, folder):
    model = adapted(False)
    initialize_lora(model, "pissa")
    if trained:
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B["default"].weight.mul_(1.5)
    return plain(model)


def another_changed_the_base(trained, folder):
    torch.manual_seed(1)
    model = add_lora(small_vit(), 4, 8, adapter_name="other").eval()
    initialize_lora(model, "pissa", adapter_name="other")
    # add_lora refuses, peft does not.
    model.add_adapter("default", LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["head"]))
    model.set_adapter("default")
    return plain(train(model) if trained else model)


def half(trained, folder):
    return plain(adapted(trained).half(), dtype=torch.float16, tolerance=0.03)


def bfloat16(trained, folder):
    return plain(adapted(trained).bfloat16(), dtype=torch.bfloat16, tolerance=0.2)


def adapter_half(trained, folder):
    model = adapted(trained)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.half()
    return plain(model, tolerance=0.01)


def meta(trained, folder):
    state = plain(adapted(trained))
    state.model, state.device = state.model.to("meta"), "meta"
    return state


def offloaded_to_cpu(trained, folder):
    state = plain(adapted(trained))
    accelerate.cpu_offload(state.model)
    return state


def offloaded_to_disk(trained, folder):
    state = plain(adapted(trained))
    accelerate.disk_offload(state.model, str(folder / "offload"), execution_device=torch.device("cpu"))
    return state


STATES = {
    "fresh": fresh,
    "initialised": initialised,
    "trained": trained,
    "merged": merged,
    "switched off": switched_off,
    "inside `with disable_adapter()`": inside,
    "frozen": frozen,
    "head frozen": head_frozen,
    "head replaced": head_replaced,
    "`torch.compile(model)`": compiled,
    "`model.compile()`": compiled_in_place,
    "one block compiled": block_compiled,
    "a second one beside it": second_beside,
    "two active": two_active,
    "it changed the base": changed_the_base,
    "another changed the base": another_changed_the_base,
    "float16": half,
    "bfloat16": bfloat16,
    "adapter alone in float16": adapter_half,
    "on the meta device": meta,
    "offloaded to the CPU": offloaded_to_cpu,
    "offloaded to the disk": offloaded_to_disk,
}


# ------------------------------------------------------------------------------------------------ all that a model is


def near(state, expected, tolerance=None):
    found = output(state.model, state.x).double()
    assert found.isfinite().all()
    limit = tolerance or state.tolerance
    torch.testing.assert_close(found, plain_output(expected), rtol=0, atol=limit)


# -------------------------------------------------------------------------------------------------------------- verbs


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter that stock peft made and wrote, and the weights that it stands for."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(2)
    model = get_peft_model(small_vit(), LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, modules_to_save=["head"]))
    train(model).save_pretrained(folder)
    return folder, weights(model, "default")


def batches(state):
    return [(X.to(state.dtype), Y)]


def call(verb, init, state, folder, saved):
    """The verb on the adapter "default", or with a further one named "new"."""
    model = state.model
    if verb == "add_lora":
        return add_lora(model, 2, 4, adapter_name="new")
    if verb == "load_adapter":
        return load_adapter(model, saved[0], adapter_name="new")
    if verb == "initialize_lora":
        options = {"config": SETTINGS[INITIALIZERS[init].config], "show_progress_bar": False}
        return initialize_lora(model, init, batches(state), **options)
    if verb == "initialize_lora_abm_weights":
        return abm_vision.initialize_lora_abm_weights(model, batches(state), ABM, show_progress_bar=False)
    if verb == "initialize_lora_aligned_weights":
        return abm_vision.initialize_lora_aligned_weights(model, batches(state), ALIGN)
    if verb == "information_loss":
        return abm_vision.information_loss(model, batches(state), abm_vision.VIT.loss_fn)
    if verb == "check_adapters":
        return abm_vision.check_adapters(model, X.to(state.dtype))
    return save_adapter(model, folder / "adapter")


def check_beside(verb, init, state, result, before, after, folder, saved):
    """A further adapter: inactive, nothing else touched; switched on it does what it stands for, saved as well."""
    assert changes(before, after, "configurations", "attributes of", "hooks of", "adapters of", "state of torch") == []
    model = state.model
    assert result is model and set(model.peft_config) == {*before["configurations"], "new"}
    assert {n: c for n, c in after["configurations"].items() if n != "new"} == before["configurations"]
    new = {n: p for n, p in model.named_parameters() if ".new." in n}
    assert new and {p.device.type for p in new.values()} == {state.device}
    if state.device == "meta":
        assert {tuple(p.shape) for n, p in new.items() if "lora_A" in n} == {(2, 32), (2, 96)}
        return
    model.set_adapter("new")
    model.base_model.enable_adapter_layers()
    if verb == "load_adapter":
        near(state, saved[1])
    else:
        near(state, untouched())
        near(state, weights(train(model, "new"), "new"))
    save_adapter(model, folder / "both")
    stock_computes(folder / "both" / "new", weights(model, "new"), state.tolerance)


@torch.no_grad()
def stock_computes(folder, expected, tolerance):
    """Stock peft, from the file alone, on an untouched model."""
    tensors = load_file(folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(small_vit(), folder).eval()
    assert set(tensors) == set(get_peft_model_state_dict(model))
    torch.testing.assert_close(model(X).double(), plain_output(expected), rtol=0, atol=tolerance)


def check_save(verb, init, state, result, before, after, folder, saved):
    assert changes(before, after) == []
    for name, expected in state.stands.items():
        stock_computes(folder / "adapter" / ("" if name == "default" else name), expected, state.tolerance)


def check_check(verb, init, state, result, before, after, folder, saved):
    assert changes(before, after) == []
    assert result is None


def check_loss(verb, init, state, result, before, after, folder, saved):
    assert changes(before, after) == []
    expected = information_lost(state)
    assert {layer.name for layer in result.layers} == set(expected)
    for layer in result.layers:
        assert layer.loss == pytest.approx(expected[layer.name], abs=state.tolerance) and 0 <= layer.loss <= 1


def check_initialised(verb, init, state, result, before, after, folder, saved):
    """The base as it was (or less what the adapter took out of it), and what the initialisation is by definition."""
    model, layers = state.model, lora_layers(state.model)
    init = {"initialize_lora_abm_weights": "abm", "initialize_lora_aligned_weights": "abm_aligned"}.get(verb, init)
    own = [r"lora_\w+\.default", "^output$"]
    if init in (*CHANGES_BASE, "eva"):  # peft makes the layers anew, and ranks and configuration belong to EVA's result
        own += ["configurations", "adapters of", r"attributes of .*(qkv|proj|fc\d)", r"module .*lora_"]
    if init in CHANGES_BASE:
        own += [r"value of .*(qkv|proj|fc\d)\.base_layer\.weight"]
    assert changes(before, after, *([] if init == "kaiming" else own)) == []
    factors = {n: p for n, p in model.named_parameters() if re.search(r"lora_\w+\.default", n)}
    assert all(p.requires_grad and p.isfinite().all() for p in factors.values())
    assert all(p.grad is None for p in factors.values())
    now = weights(model, "default")
    near(state, now)
    moved = any(not torch.equal(now[n], state.stands["default"][n]) for n in now)
    if init in ("random_b", "abm", "abm_aligned"):
        assert moved
    elif init in ("kaiming", "eva"):
        assert not moved
    else:
        near(state, state.stands["default"])
    DEFINITIONS[init](layers, result, before, state)
    save_adapter(model, folder / "adapter")
    stock_computes(folder / "adapter", now, state.tolerance)


def is_kaiming(layers, result, before, state):
    assert result is None


def is_random_b(layers, result, before, state):
    for layer in layers.values():
        a, b = pair(layer)
        assert 0.006 < b.std() < 0.015 and a.abs().max() <= layer.in_features**-0.5 + 1e-6
    assert len({raw(layer.lora_B["default"].weight) for layer in layers.values()}) == len(layers)


def is_abm(layers, result, before, state):
    assert len(result.loss_per_step) == ABM.steps and np.isfinite(result.loss_per_step).all()
    assert 0.5 < result.after.match <= 1 and result.before.loss > 0


def is_aligned(layers, result, before, state):
    """Columns of B: the first r left singular vectors of the untouched model's gradient; rows of A: the next r."""
    found = gradients(state.stands["default"])
    for name, layer in layers.items():
        a, b = pair(layer)
        u, _, v = torch.linalg.svd(found[name])
        torch.testing.assert_close(b.norm(dim=0), torch.full((4,), result.size).double(), rtol=0.05, atol=0)
        torch.testing.assert_close(a.norm(dim=1), torch.full((4,), ALIGN.norm).double(), rtol=0.05, atol=0)
        limit = {torch.float32: 0.99, torch.float16: 0.9, torch.bfloat16: 0.75}[state.dtype]
        assert (u[:, :4].T @ b).norm() > limit * b.norm()
        assert (v[:8] @ a.T).norm() > limit * a.norm()


def is_pissa(layers, result, before, state):
    """s B A: the untouched weight's first r singular pairs."""
    for name, layer in layers.items():
        a, b = pair(layer)
        u, s, v = torch.linalg.svd(untouched()[f"{name}.weight"], full_matrices=False)
        torch.testing.assert_close(SCALE * b @ a, (u[:, :4] * s[:4]) @ v[:4], rtol=0, atol=state.tolerance)


def is_eva(layers, result, before, state):
    """Orthonormal rows of A, B zero, the ranks those that were given, shared out anew."""
    assert sum(layer.r["default"] for layer in layers.values()) == 4 * 8
    for layer in layers.values():
        a, b = pair(layer)
        assert not b.any()
        torch.testing.assert_close(a @ a.T, torch.eye(len(a)).double(), rtol=0, atol=max(1e-3, state.tolerance))


def is_lora_ga(layers, result, before, state):
    """Columns of B and rows of A among the first 2r singular vectors of the untouched model's gradient."""
    found = gradients(state.stands["default"])
    for name, layer in layers.items():
        a, b = pair(layer)
        u, _, v = torch.linalg.svd(found[name])
        limit = {torch.float32: 0.99, torch.float16: 0.9, torch.bfloat16: 0.75}[state.dtype]
        assert (u[:, :8].T @ b).norm() > limit * b.norm() > 0
        assert (v[:8] @ a.T).norm() > limit * a.norm() > 0


DEFINITIONS = {
    "kaiming": is_kaiming,
    "random_b": is_random_b,
    "abm": is_abm,
    "abm_aligned": is_aligned,
    "pissa": is_pissa,
    "eva": is_eva,
    "lora_ga": is_lora_ga,
}
CHECKS = {
    "add_lora": check_beside,
    "load_adapter": check_beside,
    "initialize_lora": check_initialised,
    "initialize_lora_abm_weights": check_initialised,
    "initialize_lora_aligned_weights": check_initialised,
    "information_loss": check_loss,
    "check_adapters": check_check,
    "save_adapter": check_save,
}
NEEDS_FRESH = ("initialize_lora", "initialize_lora_aligned_weights")


# -------------------------------------------------------------------------------------------------------------- table


def read_table():
    """(state, verb, initialisation, answer) of every cell."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|\n").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    for state, *cells in rows:
        for title, cell in zip(head[1:], cells, strict=True):
            verb, names = re.fullmatch(r"`(\w+)` ?(.*)", title).groups()
            for init in names.split(", ") if verb == "initialize_lora" else [""]:
                yield state, verb, init, cell


TABLE = list(read_table())


def test_the_table_is_whole():
    assert list(dict.fromkeys(state for state, *_ in TABLE)) == list(STATES)
    assert {verb for _, verb, *_ in TABLE} == set(CHECKS)
    assert {init for *_, init, _ in TABLE if init} == set(DEFINITIONS)


@pytest.mark.parametrize("name", [name for name in STATES if name != "on the meta device"])
def test_output(name, tmp_path):
    state = STATES[name](True, tmp_path)
    near(state, state.shows)
    near(state, state.shows)
    state.stack.close()


@pytest.mark.parametrize(
    "name, verb, init, answer",
    TABLE,
    ids=[f"{state}: {verb} {init}".strip(" ").replace("`", "") for state, verb, init, _ in TABLE],
)
def test_cell(name, verb, init, answer, saved, tmp_path):
    _alive.clear()
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    state = STATES[name](verb not in NEEDS_FRESH, tmp_path)
    with state.stack:
        before = snapshot(state.model, state.x)
        try:
            result, refusal = call(verb, init, state, tmp_path, saved), None
        except ValueError as error:
            result, refusal = None, str(error)
        after = snapshot(state.model, state.x)
    if refusal is None:
        assert answer == "value", f"no refusal, though it should say {answer!r}"
        CHECKS[verb](verb, init, state, result, before, after, tmp_path, saved)
    else:
        assert answer != "value" and answer in refusal, refusal
        assert changes(before, after) == []
        assert not list(tmp_path.glob("adapter*")), "a refused save leaves files"


@pytest.mark.parametrize("verb", ["add_lora", "load_adapter"])
def test_a_further_adapter_takes_the_mode_of_its_layer(verb, saved, tmp_path):
    """Its dropout would otherwise draw in an evaluated model."""
    state = trained(True, tmp_path)
    call(verb, "", state, tmp_path, saved)
    for module in state.model.modules():
        assert module.training is (module is not state.model and module in set(bare(state.model).blocks[0].modules()))


def compiled_block(model):
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    return model


def compiled_itself(model):
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("verb", ["add_lora", "load_adapter", "initialize_lora", "save_adapter"])
def test_who_changed_the_base_was_deleted(verb, saved, tmp_path):
    """peft forgets the adapter; the base stays as it was made, under the other ones."""
    state = another_changed_the_base(verb not in NEEDS_FRESH, tmp_path)
    state.model.delete_adapter("other")
    before = snapshot(state.model, X)
    with pytest.raises(ValueError, match="changed the base"):
        call(verb, "random_b", state, tmp_path, saved)
    assert changes(before, snapshot(state.model, X)) == []


@pytest.mark.parametrize("make", [trained, changed_the_base])
@pytest.mark.parametrize("verb", CHECKS)
def test_every_adapter_was_deleted(verb, make, saved, tmp_path):
    """Nothing of peft's works on such a model, `get_base_model()` included."""
    state = make(True, tmp_path)
    state.model.delete_adapter("default")
    with pytest.raises(ValueError, match="no adapter|changed the base"):
        call(verb, "random_b", state, tmp_path, saved)


BARE = {  # bare models: the word of the refusal
    "compiled": (lambda model: torch.compile(model, backend="eager"), "compiled"),
    "compiled in place": (compiled_itself, "compiled"),
    "a block compiled": (compiled_block, "compiled"),
    "offloaded": (lambda model: accelerate.cpu_offload(model), "offloaded"),
    "adapted, without peft's wrapper": (lambda model: bare(add_lora(model, 4, 8)), "LoRA layers"),
}


@pytest.mark.parametrize("verb", ["add_lora", "load_adapter"])
@pytest.mark.parametrize("name", BARE)
def test_bare_models(name, verb, saved):
    make, word = BARE[name]
    model = make(small_vit())
    before = {n: id(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=word):
        add_lora(model, 4, 8) if verb == "add_lora" else load_adapter(model, saved[0])
    assert {n: id(m) for n, m in model.named_modules()} == before


def test_bare_model_on_the_meta_device_gets_its_weights_later(saved):
    """`add_lora` on meta, then peft's own way to fill it; an adapter loaded there would be lost."""
    real = _adapted(True)
    model = add_lora(small_vit().to("meta"), 4, 8).eval()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(model(X).double(), plain_output(weights(real, "default")), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="meta"):
        load_adapter(small_vit().to("meta"), saved[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.03), (torch.bfloat16, 0.2)])
def test_bare_model_in_half_precision(dtype, tolerance, saved, tmp_path):
    """Stock peft keeps the factors in float32 there."""
    model = add_lora(small_vit().to(dtype), 4, 8).eval()
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    state = plain(train(model), dtype=dtype, tolerance=tolerance)
    near(state, state.shows)
    save_adapter(model, tmp_path)
    stock_computes(tmp_path, state.stands["default"], tolerance)
    state.model = load_adapter(small_vit().to(dtype), saved[0]).eval()
    near(state, saved[1])
