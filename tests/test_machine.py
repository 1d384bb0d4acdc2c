"""Verbs in random order: the model's output is always that of a plain model with W0 + sum s B A, computed by hand."""

import tempfile
from pathlib import Path

import pytest
import torch
from helpers import changes, snapshot
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.func import functional_call

from abm_vision import (
    INITIALIZERS,
    ABMConfig,
    AlignConfig,
    Backbone,
    add_lora,
    check_adapters,
    initialize_lora,
    load_adapter,
    save_adapter,
)
from abm_vision.initializers import InitConfig

X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
SCALE = 2.0  # alpha / r of every adapter here
LAYERS = ("0.mix", "0.up", "0.down")
INITS = {  # to whether it changes more than the factors
    "kaiming": False,
    "gaussian": False,
    "random_b": False,
    "abm": False,
    "abm_aligned": False,
    "pissa": True,
    "olora": True,
    "lora_ga": True,
    "eva": True,
}
CHANGES_BASE = ("pissa", "olora", "lora_ga")
NAMES = st.sampled_from(["one", "two", "three"])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.up, self.act, self.down = nn.Linear(4, 4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.down(self.act(self.up(x + self.mix(x))))


RECORD = Backbone(
    name="own",
    matches=lambda model: isinstance(model, nn.Sequential),
    target_modules={"attention": r"\d+\.mix", "mlp": r"\d+\.(up|down)"},
    boundary_modules={"blocks": r"\d+\.act"},
    head_modules=lambda model: ["1"],
    forward_fn=lambda model, batch: model(batch),
    loss_fn=lambda model, batch: model(batch).square().mean(),
)


def bare():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(4, 3)).eval()


def products(layer, name):
    """B A of an adapter, float64."""
    return layer.lora_B[name].weight.detach().double() @ layer.lora_A[name].weight.detach().double()


SETTINGS = {ABMConfig: ABMConfig(steps=2, samples=20), AlignConfig: AlignConfig(samples=20, match=0.5)}


class Adapters(RuleBasedStateMachine):
    """What is known: of every adapter what it adds to each layer and its head, and what peft has switched."""

    @initialize(heads=st.booleans(), init=st.just("") | st.sampled_from(list(INITS)))
    def first(self, heads, init):
        self.folder = tempfile.TemporaryDirectory()
        self.heads = ["1"] if heads else []
        self.plain = {name: value.double() for name, value in bare().state_dict().items()}
        self.saved = []
        torch.manual_seed(1)
        self.begin(add_lora(bare(), 2, 4, modules_to_save=self.heads, adapter_name="one", backbone=RECORD))
        self.remember("one", fresh=True)
        if init:
            self.attempt_to_initialise("one", init)

    def begin(self, model):
        self.model = model.eval()
        self.shifts, self.head, self.fresh = {}, {}, set()  # by adapter
        self.taken = {}  # what an initialisation took out of the base weights, by layer
        self.origin = None  # the adapter that did
        self.active, self.merged, self.disabled = ["one"], [], False

    def teardown(self):
        if hasattr(self, "folder"):
            self.folder.cleanup()

    # --------------------------------------------------------------------------------------------- what is known

    def layers(self):
        modules = self.model.get_base_model().named_modules()
        return {name: module for name, module in modules if isinstance(module, LoraLayer)}

    def remember(self, name, fresh=False):
        """Read the factors, which nothing but `train` and initialisations may change from here on."""
        self.shifts[name] = {
            n: SCALE * products(layer, name) for n, layer in self.layers().items() if name in layer.lora_A
        }
        self.fresh = (self.fresh | {name}) if fresh else self.fresh - {name}
        if self.heads:
            state = self.model.get_base_model()[1].modules_to_save[name].state_dict()
            self.head[name] = {f"1.{n}": value.double() for n, value in state.items()}

    def stands(self, name):
        """The weights of the plain model that the file of an adapter stands for: on the base as it is."""
        return self.weights([name])

    def weights(self, names, head=None):
        weights = dict(self.plain)
        for name, shift in [*((n, self.shifts[n]) for n in names), (None, self.taken)]:
            for layer, change in shift.items():
                key = f"{layer}.weight"
                weights[key] = weights[key] + (change if name else -change)
        head = names[0] if names and head is None else head
        return {**weights, **self.head.get(head, {})}

    def near(self, model, weights):
        torch.testing.assert_close(
            model(X).detach().double(), functional_call(bare(), weights, X.double()), rtol=0, atol=2e-5
        )

    def reasons(self, name=None, init=None):
        """Words, of which the refusal of a verb must have one; none if the verb must go through."""
        words = set()
        if self.merged:
            words.add("merged")
        if self.taken:
            words.add("changed the base")
        if init is None:
            return words | ({"already has"} if name in self.shifts else set())
        if self.disabled:
            words.add("disabled")
        if self.active != [name]:
            words |= {"active", "no adapter"}
        if name not in self.fresh:
            words |= {"fresh", "no adapter"}
        if INITS[init] and len(self.shifts) > 1:
            words.add("alone")
        return words

    def attempt(self, words, verb, *arguments, **options):
        """The verb goes through where there is no word against it; otherwise it refuses and leaves all as it was."""
        before = snapshot(self.model, X)
        try:
            result = verb(*arguments, **options)
        except ValueError as error:
            assert any(word in str(error) for word in words), f"{error}; against it: {words}"
            assert changes(before, snapshot(self.model, X)) == []
            return None
        assert not words, f"no refusal, though there is: {words}"
        return result

    # ------------------------------------------------------------------------------------------------------ verbs

    @precondition(lambda self: len(self.shifts) < 3)
    @rule(name=NAMES)
    def add(self, name):
        options = {"modules_to_save": self.heads, "adapter_name": name, "backbone": RECORD}
        if self.attempt(self.reasons(name), add_lora, self.model, 2, 4, **options):
            self.remember(name, fresh=True)

    @precondition(lambda self: not self.merged)
    @rule(name=NAMES)
    def add_with_stock_peft(self, name):
        if name not in self.shifts:
            config = LoraConfig(r=2, lora_alpha=4, target_modules=list(LAYERS), modules_to_save=self.heads or None)
            self.model.add_adapter(name, config)
            self.remember(name, fresh=True)

    @rule(name=st.just("") | NAMES, init=st.sampled_from(list(INITS)))
    def initialise(self, name, init):
        self.attempt_to_initialise(name or self.active[0], init)

    def attempt_to_initialise(self, name, init):
        options = {
            "config": SETTINGS.get(INITIALIZERS[init].config, InitConfig(samples=20)),
            "adapter_name": name,
            "backbone": RECORD,
            "show_progress_bar": False,
        }
        words, before = self.reasons(name, init), self.model(X).detach()
        self.attempt(words, initialize_lora, self.model, init, [X], **options)
        if words:
            return
        self.remember(name, fresh=init == "kaiming")
        if init in CHANGES_BASE:
            self.taken, self.origin = dict(self.shifts[name]), name
        if init not in ("random_b", "abm", "abm_aligned"):
            torch.testing.assert_close(self.model(X), before, rtol=0, atol=2e-5)

    @rule(name=NAMES, seed=st.integers(0, 3))
    def train(self, name, seed):
        if name not in self.shifts or name in self.merged:
            return
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for n, parameter in self.model.named_parameters():
                if f".{name}." in n:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        self.remember(name)

    @rule()
    def save(self):
        folder = Path(self.folder.name) / str(len(self.saved))
        words = {"changed the base"} if self.taken and set(self.shifts) != {self.origin} else set()
        self.attempt(words, save_adapter, self.model, folder)
        if words:
            return
        for name in self.shifts:
            path, weights = folder / name, self.stands(name)
            self.near(PeftModel.from_pretrained(bare(), path).eval(), weights)
            self.saved.append((path, weights))

    @rule(name=NAMES, which=st.integers(0), trainable=st.booleans())
    def load(self, name, which, trainable):
        path, weights = self.a_saved_one(which)
        options = {"adapter_name": name, "is_trainable": trainable, "backbone": RECORD}
        if self.attempt(self.reasons(name), load_adapter, self.model, path, **options):
            self.loaded(name, weights)

    @rule(which=st.integers(0))
    def load_into_a_fresh_model(self, which):
        path, weights = self.a_saved_one(which)
        self.begin(load_adapter(bare(), path, adapter_name="one", is_trainable=True, backbone=RECORD))
        self.loaded("one", weights)

    def a_saved_one(self, which):
        """A folder, and the weights that it stands for; an adapter of stock peft's if nothing was saved yet."""
        if not self.saved:
            path = Path(self.folder.name) / "stock"
            config = LoraConfig(r=2, lora_alpha=4, target_modules=list(LAYERS), modules_to_save=self.heads or None)
            model = get_peft_model(bare(), config)
            weights = dict(self.plain)
            for name, layer in model.get_base_model()[0].named_children():
                if isinstance(layer, LoraLayer):
                    nn.init.normal_(layer.lora_B["default"].weight)
                    weights[f"0.{name}.weight"] = weights[f"0.{name}.weight"] + SCALE * products(layer, "default")
            model.save_pretrained(path)
            self.saved.append((path, weights))
        return self.saved[which % len(self.saved)]

    def loaded(self, name, weights):
        """What came out of a file is what went in."""
        self.remember(name)
        if not any(shift.any() for shift in self.shifts[name].values()):
            self.fresh.add(name)
        for n, value in self.stands(name).items():
            torch.testing.assert_close(value, weights[n], rtol=0, atol=1e-5)

    def check(self):
        words = {"merged"} if self.merged else set()
        words |= {"disabled"} if self.disabled else set()
        trainable = any(p.requires_grad for n, p in self.model.named_parameters() if "lora_" in n)
        words |= set() if trainable else {"frozen"}
        self.attempt(words, check_adapters, self.model, X, backbone=RECORD)

    # ---------------------------------------------------------------------------------------------- peft's switches

    @rule(switch=st.sampled_from(["merge", "unmerge", "disable", "enable", "enable", "look at the base"]))
    def flip(self, switch):
        self.check()
        if switch == "merge" and not self.disabled:
            self.model.merge_adapter()
            self.merged += [name for name in self.active if name not in self.merged]
        elif switch == "unmerge":
            self.model.unmerge_adapter()
            self.merged = []
        elif switch == "disable":
            self.model.base_model.disable_adapter_layers()
            self.model(X)
            self.disabled, self.merged = True, []  # the forward pass has unmerged
        elif switch == "enable":
            self.model.base_model.enable_adapter_layers()
            self.disabled = False
        elif switch == "look at the base":
            with self.model.disable_adapter():
                self.near(self.model, self.weights([]))
            self.merged = []

    @rule(names=st.lists(NAMES, min_size=1, max_size=2, unique=True))
    def activate(self, names):
        names = [name for name in names if name in self.shifts][: 1 if self.heads else 2]
        if names:
            self.model.set_adapter(names[0])  # peft's own word for one; for several it has only its inner model's
            self.model.base_model.set_adapter(names)
            self.active, self.merged = names, []  # peft unmerges

    @precondition(lambda self: len(self.shifts) > 1)
    @rule(name=NAMES)
    def delete(self, name):
        if name in self.shifts and name not in self.merged:
            self.model.delete_adapter(name)
            self.shifts.pop(name), self.head.pop(name, None)
            self.fresh.discard(name)
            self.active = list(self.model.active_adapters)  # peft's choice

    @invariant()
    def output_is_that_of_the_plain_model(self):
        if not hasattr(self, "model"):
            return
        if self.disabled:
            expected = self.weights([])
        else:
            shown = self.merged or self.active
            expected = self.weights(shown, head=self.active[0])
        self.near(self.model, expected)
        assert set(self.model.peft_config) == set(self.shifts) and list(self.model.active_adapters) == self.active


class AdaptersAtLength(Adapters):
    pass


def examples(count):
    options = {"derandomize": True, "phases": [Phase.generate], "suppress_health_check": list(HealthCheck)}
    return settings(max_examples=count, stateful_step_count=12, deadline=None, **options)


TestAdapters, TestAdaptersAtLength = Adapters.TestCase, pytest.mark.slow(AdaptersAtLength.TestCase)
TestAdapters.settings, TestAdaptersAtLength.settings = examples(15), examples(70)
