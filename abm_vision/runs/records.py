"""The files of a run as tables of fields, types and ranges: what does not fit is an error that names file and field."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from abm_vision.abm.arguments import count
from abm_vision.abm.files import read_object
from abm_vision.initializers import INITIALIZERS, Initializer, get_initializer, load_plugin
from abm_vision.runs.settings import PLUGIN, AdapterSettings

REMEDY = "move its folder away to run again"
AFRESH = "--rerun, or deleting its folder, starts afresh"  # of what an interrupted run has left
Number = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Times = dict[str, Seconds]
Precision = Literal["bf16", "fp32"]
StepKind = Literal["eager", "graph"]  # how training steps ran


NUMBERED = "vtab"  # the harness whose schema is a number alone


class OtherHarness(ValueError):
    """A record is another harness's.

    Args:
        path: of the record.
        schema: its own.
        program: the command that writes such records.
    """

    def __init__(self, path: Path, schema: int | str, program: str) -> None:
        super().__init__(f"{path} has schema {schema!r}, it is of {program}: give it to {program}")
        self.program = program


class Record(BaseModel):
    """A JSON object with these fields and no others; no NaN, and nothing is taken for another type."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def settings_of(config: type[AdapterSettings]) -> Any:
    """The type of a dictionary with all settings of a harness, each in its range."""

    def check(found: dict[str, Any]) -> dict[str, Any]:
        own = _row(found.get("init", config.init), found.get(PLUGIN)).settings
        if absent := sorted((config.plain() | set(own)) - set(found)):
            raise ValueError(f"it lacks {', '.join(absent)}")
        if unknown := sorted(set(found) - set(config.settings())):
            raise ValueError(f"it holds {', '.join(unknown)}, which are no settings")
        config.make(**{**found, "device": "auto"})  # the device is that of the machine it was made on
        return found

    return Annotated[dict[str, Any], AfterValidator(check)]


class NotRegistered(LookupError):
    """The initialisation of a file is not known here, so nobody can say whether the file is good."""


def _row(init: Any, plugin: Any) -> Initializer:
    if plugin is not None:
        try:
            load_plugin(plugin)
        except ValueError as error:
            raise NotRegistered(f"it was made with --plugin {plugin}, and {error}") from error
    if isinstance(init, str) and init not in INITIALIZERS:
        by = "" if plugin is None else f" by its plugin {plugin}"
        raise NotRegistered(f"its init {init!r} is not registered{by}: name the module that registers it with --plugin")
    return get_initializer(init)


def checked(content: Any, kind: type[BaseModel], where: str, remedy: str = REMEDY) -> Any:
    """The content, if it is of that kind.

    Raises:
        ValueError: it is not; the message names what is wrong first, and the remedy. Or its initialisation is not
            registered.
    """
    try:
        TypeAdapter(kind).validate_python(content)
    except ValidationError as error:
        raise ValueError(f"{where}: {_in_words(error)}; {remedy}") from None
    except NotRegistered as error:
        raise ValueError(f"{where}: {error}") from None
    return content


def read_record(
    path: Path, kind: type[BaseModel], schema: int | str | None = None, remedy: str = REMEDY
) -> dict[str, Any]:
    """The JSON object in a file, of that kind.

    Raises:
        FileNotFoundError: it is not there.
        OtherHarness: it is of another one than the schema that is given.
        ValueError: it is damaged, of another schema than is given, or a field is missing, of another type or out of
            its range.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {remedy}")
    content = read_object(path, remedy)
    found = content.get("schema")
    if schema is not None and found != schema:
        if (program := _program(found)) not in (None, _program(schema)):
            raise OtherHarness(path, found, program)
        raise ValueError(f"{path} has schema {found!r}, this version reads {schema!r}; {remedy}")
    return checked(content, kind, str(path), remedy)


def _program(schema: Any) -> str | None:
    """The command whose records have this schema, `abm-glue` of `glue-3`; None if it is none."""
    name = re.fullmatch(r"(?:([a-z_]+)-)?\d+", str(schema))
    return f"abm-{name[1] or NUMBERED}" if name else None


class Recorded(BaseModel):
    """What is read of a file for the sake of its settings."""

    config: dict[str, Any]


def read_config(path: str | Path, schema: int | str) -> dict[str, Any]:
    """The settings in a file: a run's own `config.json` or `result.json`, or some (`lr: 1e-3`) in YAML or JSON.

    Raises:
        FileNotFoundError, ValueError: no such file, no JSON or YAML, or another schema.
    """
    path, remedy = Path(path), "write the settings as flags instead"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; {remedy}")
    if path.suffix not in (".yaml", ".yml"):
        found = read_object(path, remedy)
        return read_record(path, Recorded, schema, remedy)["config"] if {"schema", "config"} & set(found) else found
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML ({error}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings by name, such as `lr: 1e-3`")
    return {str(name): _number(value) for name, value in found.items()}


def _number(value: Any) -> Any:
    """A number that YAML 1.1 takes for a word because it has no point: 1e-3."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I) else value


def _in_words(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    absent = [_place(one["loc"]) for one in found if one["type"] == "missing"]
    if absent:
        return f"it lacks {', '.join(absent)}"
    first = found[0]
    words = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{_place(first['loc'])}: {words}" if first["loc"] else words  # of a field, or of all together
    given = repr(first["input"])
    return f"{_place(first['loc'])} is {given if len(given) < 60 else given[:60] + ' ...'} ({words})"


def _place(parts: Collection[Any]) -> str:
    return ".".join(map(str, parts)) or "it"


# ------------------------------------------------------------------------------------- what every harness writes


class Settings(Record):
    """`config.json` of a run's folder; its harness reads the settings again from the command line."""

    schema_: int | str = Field(alias="schema")
    config: dict[str, Any]
    precision: Precision | None = None


class Failure(Record):
    """`failure.json`."""

    schema_: int | str = Field(alias="schema")
    reason: str
    time: str


class Reference(Record):
    """The tuned adapter that an initialisation took its signs from."""

    folder: str
    seconds: Seconds | None


class Tuned(BaseModel):
    """What is read of the result of a run, of any harness, that tuned a reference."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    seconds: Times


class Layer(Record):
    """One line of an information loss."""

    name: str
    energy: Annotated[float, Field(ge=0)]
    loss: float
    optimum: float
    random: float


class Loss(Record):
    """An information loss."""

    overall: Layer
    kinds: Annotated[list[Layer], Field(min_length=1)]
    layers: Annotated[list[Layer], Field(min_length=1)]
    samples: Positive
    seconds: Seconds


class Losses(Record):
    """An information loss before and after an initialisation."""

    before: Loss
    after: Loss
    after_on_seen: Loss


class Pretrained(Record):
    """What was measured of the pretrained model before a run on instructions."""

    before: float
    answered: list[str]


class Notes(Record):
    """What is kept of the initialisation of an interrupted run."""

    origin: dict[str, str | int]
    information_loss: Losses | None
    seconds: Times = {}
    report: dict[str, Any] | None = None
    reference: Reference | None = None
    start: str | None = None
    pretrained: Pretrained | None = None


class Commit(Record):
    """A commit of this package's checkout."""

    id: str
    modified: bool


class Environment(Record):
    """Versions and devices."""

    python: str
    packages: dict[str, str | None]
    commit: Commit | None
    device: str
    threads: Positive
    platform: str


class Result(Record):
    """`result.json`: what that of every harness holds."""

    schema_: int | str = Field(alias="schema")
    config: dict[str, Any]
    origin: dict[str, str | int]
    precision: Precision
    trainable_parameters: Positive
    abm: dict[str, Any] | None
    reference: Reference | None
    information_loss: Losses | None
    loss_per_step: Annotated[list[Number], Field(min_length=1)]
    seconds_per_epoch: list[Seconds]
    seconds: Times
    peak_memory_mib: Annotated[float, Field(ge=0)] | None
    environment: Environment
    reference_only: bool = False

    @model_validator(mode="after")
    def _whole_epochs(self) -> Result:
        epochs = self.config["epochs"]
        if len(self.seconds_per_epoch) != epochs or len(self.loss_per_step) % epochs:
            found = f"{len(self.loss_per_step)} losses and {len(self.seconds_per_epoch)} times"
            raise ValueError(f"{found} are not those of {count(epochs, 'epoch')}")
        return self

    @model_validator(mode="after")
    def _timed(self) -> Result:
        if absent := sorted({"init", "train"} - set(self.seconds)):
            raise ValueError(f"it lacks seconds.{', seconds.'.join(absent)}")
        return self
