"""Adapter: one LoRA adapter of a model, what is known of it, and what may be done with it.

Every verb asks here, once, at its public edge, so that a question has one answer in one set of words.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from abm_vision.abm.base_change import base_changes, changes_base, is_still_changed, keep_base_changes, lora_layers
from abm_vision.abm.merged_linear import is_plain
from abm_vision.abm.names import WRAPPERS, plain_name


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile(model)` made it, or `model.compile()` was called."""
    return "_orig_mod" in model._modules or model._compiled_call_impl is not None


def check_eager(model: nn.Module) -> None:
    """Raise a ValueError if the model or a part of it is compiled, so that hooks might not fire and names differ."""
    compiled = next((plain_name(f"{n}.").rstrip(".") for n, m in model.named_modules() if is_compiled(m)), None)
    if compiled is not None:
        raise ValueError(f"{compiled or 'the model'} is compiled: call torch.compile last, on what is finished")


def adapted_layers(model: PeftModel, adapter_name: str) -> dict[str, LoraLayer]:
    """Name in the bare model to the layers that carry the adapter, in the model's order."""
    layers = lora_layers(model.get_base_model())
    return {plain_name(name): layer for name, layer in layers if adapter_name in layer.lora_A}


class Adapter:
    """One LoRA adapter of a model.

    Args:
        model: what `add_lora`, `load_adapter` or `get_peft_model` returned.
        name: peft's name of the adapter.

    Raises:
        ValueError: the model is no PeftModel, or has no LoRA adapter of this name.
    """

    def __init__(self, model: nn.Module, name: str = "default") -> None:
        if not isinstance(model, PeftModel):
            hint = "call add_lora first"
            if isinstance(model, nn.Module) and is_compiled(model):
                hint = "it is compiled: call torch.compile last"
            elif isinstance(getattr(model, "module", None), PeftModel):
                hint = "pass the model inside, model.module"
            raise ValueError(f"{type(model).__name__} is no PeftModel: {hint}")
        check_some_adapter(model)
        if not isinstance(name, str):
            raise ValueError(f"adapter_name is {name!r}; it must be one of the model's names")
        if name not in model.peft_config:
            known = ", ".join(map(repr, model.peft_config))
            raise ValueError(f"there is no adapter {name!r}; the model has {known}")
        if not isinstance(model.peft_config[name], LoraConfig):
            raise ValueError(f"adapter {name!r} is {model.peft_config[name].peft_type.value}, not LoRA")
        self.model: PeftModel = model
        self.name: str = name

    @property
    def config(self) -> LoraConfig:
        """Peft's configuration of it."""
        return self.model.peft_config[self.name]

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """Name in the bare model to the layers that carry it, in the model's order."""
        return adapted_layers(self.model, self.name)

    @property
    def factors(self) -> list[nn.Parameter]:
        """A and B of every layer, and their biases where there are any."""
        return [
            parameter
            for layer in self.layers.values()
            for table in (layer.lora_A, layer.lora_B)
            for parameter in table[self.name].parameters()
        ]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Those of `factors` that require gradient."""
        return [parameter for parameter in self.factors if parameter.requires_grad]

    @cached_property
    def device(self) -> torch.device:
        """Where it lies."""
        return next(iter([*self.factors, *self.model.parameters()])).device

    @property
    def is_zero(self) -> bool:
        """Whether every B is zero."""
        found = [layer.lora_B[self.name].weight.any() for layer in self.layers.values()]
        return not (found and torch.stack([one.to(found[0].device) for one in found]).any())  # waited for once

    @property
    def does_nothing(self) -> bool:
        """Whether the adapted model is the pretrained one: B is zero, no variant, no saved module changed."""
        return (
            self.is_zero
            and not any(self.name in layer.lora_variant for layer in self.layers.values())
            and not any(self._has_changed(wrapper) for wrapper in _saved_modules(self.model))
        )

    def _has_changed(self, wrapper: ModulesToSaveWrapper) -> bool:
        if self.name not in wrapper.modules_to_save:
            return False
        own, original = wrapper.modules_to_save[self.name].state_dict(), wrapper.original_module.state_dict()
        return not all(torch.equal(value, original[name]) for name, value in own.items())

    # ------------------------------------------------------------------------------------ what may be done with it

    def check_runs(self) -> None:
        """Raise a ValueError unless a forward pass runs the adapter, with hooks that fire and factors that are there.

        Merged, switched off, compiled, on the meta device, offloaded: the message says which, and what to do.
        """
        check_eager(self.model)
        check_saved_modules(self.model)
        self._check_here()
        for name, layer in self.layers.items():
            if layer.merged:
                raise ValueError(f"{name} is merged into the base weights: call model.unmerge_adapter() first")
            if layer.disable_adapters:
                raise ValueError(
                    "adapters are disabled: leave model.disable_adapter(), or call "
                    "model.base_model.enable_adapter_layers() first"
                )

    def check_alone(self) -> None:
        """Raise a ValueError unless a forward pass runs this adapter, no other one, and it can be trained."""
        self.check_runs()
        if list(self.model.active_adapters) != [self.name]:
            raise ValueError(
                f"the active adapters are {self.model.active_adapters}, but exactly {self.name!r} is wanted: call "
                f"model.set_adapter({self.name!r}) first"
            )
        if not self.trained:
            raise ValueError(f"adapter {self.name!r} is frozen: load it with is_trainable=True, or thaw it")

    def check_fresh(self) -> None:
        """Raise a ValueError unless it is as `add_lora` made it, on base weights that nobody has changed."""
        self.check_alone()
        check_base(self.model)
        if self.config.init_lora_weights is not True or not self.is_zero:
            raise ValueError(f"adapter {self.name!r} is not fresh, it was initialised or trained: begin with add_lora")

    def check_weights(self, what: str, remedy: str) -> None:
        """Raise a ValueError unless the base weights can be computed with: plain, finite, floating-point numbers."""
        for name, layer in self.layers.items():
            weight = layer.get_base_layer().weight
            if weight.device.type == "meta":
                raise ValueError(
                    f"{what} computes with the base weights, and those of {name} are offloaded: initialise the adapter "
                    f"before, or {remedy}"
                )
            if not is_plain(weight):
                kind = weight.dtype if type(weight) is nn.Parameter else type(weight).__name__
                raise ValueError(
                    f"{what} computes with the base weights, and those of {name} are quantised ({kind}): {remedy}"
                )
            if not weight.isfinite().all():
                raise ValueError(f"the base weight of {name} is NaN or infinite: load the pretrained weights again")

    def check_no_dora(self, what: str) -> None:
        """Raise a ValueError if it is DoRA, whose weight is not W0 + s B A."""
        if self.config.use_dora:
            raise ValueError(f"{what} is made for W0 + s B A, which DoRA rescales: use dora=False")

    def _check_here(self) -> None:
        absent = absence(self.model)
        if absent == "meta" or self.device.type == "meta":
            raise ValueError(
                "the adapter is offloaded: initialise, check and measure it first, then offload the model"
                if absent == "offloaded"
                else "the model is on the meta device, without values: load its weights first"
            )


def absence(model: nn.Module) -> str | None:
    """Where a model's values are, if not all are here: "offloaded" by accelerate's hooks, or "meta": nowhere."""
    if not any(p.device.type == "meta" for p in model.parameters()):
        return None
    return "offloaded" if any(hasattr(module, "_hf_hook") for module in model.modules()) else "meta"


# ------------------------------------------------------------------------------------------- the model around adapters


def check_room(model: nn.Module, adapter_name: str) -> nn.Module:
    """The bare model of one that an adapter of this name can be added to.

    Raises:
        ValueError: it cannot: compiled, offloaded, merged, on changed base weights, or the name is taken.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"the model is {model!r}; it must be a torch.nn.Module, such as timm.create_model gives")
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name or adapter_name in _TAKEN_NAMES:
        raise ValueError(f"adapter_name is {adapter_name!r}; it must be a word without dots, such as 'default'")
    check_eager(model)
    if absence(model) == "offloaded":
        raise ValueError("the model is offloaded, and a new adapter would have no values: add it first, then offload")
    if not isinstance(model, PeftModel):
        if any(lora_layers(model)):
            raise ValueError(
                "the model contains LoRA layers but is no PeftModel: pass the PeftModel that get_peft_model returned, "
                "or a bare model (model.unload())"
            )
        changed = next(((n, m.changed_by[0]) for n, m in model.named_modules() if is_still_changed(m)), None)
        if changed:
            raise ValueError(
                f"the initialisation of adapter {changed[1]!r} has changed the base weights, and {changed[0]} still "
                "has what was left of them: load the pretrained weights again"
            )
        return model
    check_some_adapter(model)
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter named {adapter_name!r}: a second add_lora would train on top of it. "
            "Give another adapter_name, or start from model.unload()."
        )
    check_base(model)
    check_saved_modules(model)
    merged = next((name for name, layer in lora_layers(model.get_base_model()) if layer.merged), None)
    if merged:
        raise ValueError(f"{merged} is merged into the base weights: call model.unmerge_adapter() first")
    return model.get_base_model()


# Names that torch or peft have another use for: they would end up in a table of modules.
_TAKEN_NAMES = {"weight", "bias", "base_layer", "modules_to_save", "original_module", *dir(nn.ModuleDict())}


def check_some_adapter(model: PeftModel) -> None:
    """Raise a ValueError if the last adapter was deleted: peft then has no configuration to go by."""
    if not model.peft_config:
        check_base(model)
        raise ValueError("the model has no adapter: take the bare model, model.unload()")
    for name, config in model.peft_config.items():
        if not isinstance(config, LoraConfig):
            raise ValueError(f"adapter {name!r} is {config.peft_type.value}, not LoRA")


def check_base(model: PeftModel, remedy: str = "begin with the bare model", *, but: str | None = None) -> None:
    """Raise a ValueError if an adapter (`but` one) has changed the base weights that others would be made for."""
    changed = [name for name, config in model.peft_config.items() if changes_base(config)]
    changed += [name for _, layer in lora_layers(model) for name in base_changes(layer)]
    name = next((name for name in changed if name != but), None)
    if name:
        raise ValueError(f"the initialisation of adapter {name!r} has changed the base weights: {remedy}")


def _unwrapped(module: nn.Module) -> nn.Module:
    """A module without torch's wrappers around it."""
    inner = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
    return module if inner is None else _unwrapped(inner)


def _saved_modules(model: nn.Module) -> Iterator[ModulesToSaveWrapper]:
    return (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))


def check_saved_modules(model: PeftModel) -> None:
    """Raise a ValueError if a module of `modules_to_save` is no longer peft's wrapper.

    timm's `reset_classifier()` puts a bare layer where peft's wrapper was; peft would then write no head at all.
    """
    bare = model.get_base_model()
    for name, config in model.peft_config.items():
        targets = config.target_modules if isinstance(config.target_modules, (set, list, tuple)) else ()
        whole = {plain_name(n): _unwrapped(m) for n, m in bare.named_modules() if targets}
        replaced = next((n for n in targets if n in whole and not isinstance(whole[n], LoraLayer)), None)
        if replaced and "." in replaced:
            raise ValueError(
                f"{replaced!r} of adapter {name!r} was replaced after LoRA was added: it would neither run nor be "
                "saved. Change the model first, then call add_lora."
            )
        for suffix in config.modules_to_save or ():
            # By peft's rule, which lets a suffix of no module pass ("classifier" and "score" of task_type SEQ_CLS).
            hits = [_unwrapped(m) for n, m in bare.named_modules() if plain_name(n).endswith(suffix)]
            if hits and not any(isinstance(m, ModulesToSaveWrapper) for m in hits):
                raise ValueError(
                    f"{suffix!r} was replaced after LoRA was added (reset_classifier?): it would neither be saved "
                    "nor loaded. Reset the head first, then call add_lora."
                )


def guard(model: PeftModel) -> PeftModel:
    """Make `state_dict()` and `load_state_dict()` whole, or fail where they would lose a part of an adapter."""
    if _check_saved_modules not in model._state_dict_pre_hooks.values():
        model.register_state_dict_pre_hook(_check_saved_modules)
    keep_base_changes(model.get_base_model())
    return model


def _check_saved_modules(model: PeftModel, prefix: str, keep_vars: bool) -> None:
    check_saved_modules(model)
