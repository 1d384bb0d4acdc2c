"""What an initialisation is: the record of one, and what it may use. No torch is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, fields
from enum import Flag, auto
from typing import TYPE_CHECKING, Any

from abm_vision.abm.settings import InitConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from torch import nn

    from abm_vision.abm.align import AlignReport
    from abm_vision.abm.gradient import LossFn
    from abm_vision.abm.hooks import ForwardFn
    from abm_vision.abm.host import Backbone
    from abm_vision.abm.report import ABMReport

    Report = ABMReport | AlignReport | None

PACKAGE = __name__.partition(".")[0]
COMMON = frozenset(f.name for f in fields(InitConfig))  # a run has a setting of its own for each
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "bool": bool,
    "str": str,
    "int": int,
    "float": (int, float),
    "str | None": (str, type(None)),
}  # of settings: the annotation to what a value may be


class Needs(Flag):
    """What an initialisation must be given beside the model."""

    NOTHING = 0
    BATCHES = 1
    LABELS = 3  # batches with labels
    REFERENCE = 5  # batches, and an adapter or model whose boundaries are taken

    def __str__(self) -> str:
        batches = "labelled batches" if Needs.LABELS in self else "batches"
        return "nothing" if not self else f"{batches} and a reference" if Needs.REFERENCE in self else batches


class Properties(Flag):
    """What must be known of an initialisation by those who use it.

    CHANGES_BASE: takes what it puts into the adapter out of the base weights; `save_adapter` writes a plain adapter of
        twice the rank for the untouched base. Of all others the file is the adapter itself.
    READS_WEIGHTS: computes with the base weights, so that they must not be quantised.
    BLOCKS: works on an adapter for q and v alone inside a fused qkv, and on other layers than `nn.Linear`.
    BEYOND_FACTORS: ranks, frozen factors or base weights belong to it, too, so that whoever restores a checkpoint of A
        and B must apply it first, and no other adapter may be there.
    """

    NONE = 0
    CHANGES_BASE = auto()
    READS_WEIGHTS = auto()
    BLOCKS = auto()
    BEYOND_FACTORS = auto()


@dataclass(frozen=True)
class Ingredients:
    """What an initialisation may use.

    Args:
        model: fresh from `add_lora`, in evaluation mode or not, as the caller left it.
        adapter_name: the adapter to initialise.
        config: the settings, of the class that the row names.
        batches: calibration batches on the model's device; empty for an initialisation that needs none.
        backbone: the record of the model's family.
        forward_fn: (model, batch) runs the model.
        loss_fn: (model, batch) to the scalar mean loss.
        reference: the name of another adapter, or another model, for an initialisation that needs one.
        progress: show a bar.
    """

    model: PeftModel
    adapter_name: str
    config: Any
    batches: list[Any]
    backbone: Backbone
    forward_fn: ForwardFn
    loss_fn: LossFn
    reference: str | nn.Module | None
    progress: bool

    @property
    def layers(self) -> dict[str, LoraLayer]:
        """The adapted layers by their name in the bare model."""
        from abm_vision.abm.adapter import adapted_layers

        return adapted_layers(self.model, self.adapter_name)


@dataclass(frozen=True)
class Initializer:
    """One initialisation: a row of the table.

    Args:
        name: what `init` and `--init` take.
        summary: one line for people.
        source: the paper.
        needs: what `apply` must be given.
        apply: changes the adapter (and base weights, with `CHANGES_BASE`) in place; may return a report.
        properties: what holds of it.
        config: the class of its settings, a frozen dataclass on `InitConfig`. Every field beyond `samples` and `seed`
            is a setting of a run, and a flag.
        prefix: what the names of these begin with: `abm` makes `steps` the setting `abm_steps` and the flag
            `--abm-steps`. The initialisation's name if None.
        version: part of a run's identity, so that a changed initialisation is never answered from an old run. If None,
            a hash of the code: for functions of this package of all that they use, for others of their source files,
            too.
    """

    name: str
    summary: str
    source: str
    needs: Needs
    apply: Callable[[Ingredients], Report]
    properties: Properties = Properties.NONE
    config: type[InitConfig] = InitConfig
    prefix: str | None = None
    version: str | None = None

    @property
    def plugin(self) -> str | None:
        """The module that `apply` is from, None for this package's own."""
        module = self.apply.__module__
        return None if module.partition(".")[0] == PACKAGE else module

    @property
    def settings(self) -> dict[str, Field[Any]]:
        """The settings of a run that are this initialisation's, and the fields of `config` that they are."""
        own = (f for f in fields(self.config) if f.name not in COMMON)
        return {f"{self.prefix or self.name}_{f.metadata.get('name', f.name)}": f for f in own}

    def configure(self, settings: Mapping[str, Any], **common: Any) -> InitConfig:
        """An instance of `config`.

        Args:
            settings: those of a run, by their names there; others than `self.settings` are passed over.
            common: `samples` and `seed`.
        """
        given = {f: settings[name] for name, f in self.settings.items() if name in settings}
        own = {f.name: f.metadata["parse"](v) if "parse" in f.metadata else v for f, v in given.items()}
        return self.config(**own, **common)


def kind_of(setting: Field[Any]) -> str:
    """The annotation of a setting, a key of `TYPES`: that of its flag, if its value is parsed."""
    if "parse" in setting.metadata:
        return "str"
    return setting.type.__name__ if isinstance(setting.type, type) else str(setting.type)
