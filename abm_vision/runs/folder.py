"""A run's folder: configuration, lock, result, adapter, failure. Every file is whole or absent."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from abm_vision.abm.files import write_json, writing
from abm_vision.runs import records
from abm_vision.runs.records import OtherHarness, read_record
from abm_vision.runs.settings import AdapterSettings

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, RESULT, ADAPTER = "config.json", "result.json", "adapter"
CURVES, INFORMATION_LOSS, CHECKPOINT = "curves.png", "information_loss.png", "checkpoint.pt"
LOCK, FAILURE = ".lock", "failure.json"
ABANDONED = 60.0  # seconds after which nobody is at a configuration half written


def adapter_folder(place: str | Path) -> Path:
    """The adapter in a run's folder; another folder is the adapter's own."""
    folder = Path(place)
    return folder / ADAPTER if (folder / ADAPTER).is_dir() else folder


@dataclass(frozen=True)
class State:
    """How far a run is.

    Args:
        name: `finished`, `failed`, `interrupted` or `not begun`; `not readable` or `another harness` if its folder
            holds a result that cannot be taken.
        result: of a finished one.
        reason: why it has none, if more is known than the name says.
    """

    name: str
    result: dict[str, Any] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Kept:
    """What the runs of a harness keep in their folders.

    Args:
        config: class of their settings.
        result: schema of `result.json`.
        unfinished: names of what an interrupted run is resumed from; a finished run has none of them.
    """

    config: type[AdapterSettings]
    result: type[records.Result]
    unfinished: tuple[str, ...]

    def read(self, folder: Path) -> dict[str, Any] | None:
        """Read the result of a finished run; None for one that is not finished.

        Raises:
            ValueError: it is damaged, of another schema, or a field is missing or out of its range.
        """
        return read_record(folder / RESULT, self.result, self.config.schema) if (folder / RESULT).is_file() else None

    def state(self, folder: Path) -> State:
        """How far the run in a folder is."""
        try:
            result = self.read(folder)
        except OtherHarness as error:
            return State("another harness", reason=f"a result of {error.program}: use {error.program} report")
        except ValueError as error:
            return State("not readable", reason=str(error))
        if result is not None:
            return State("finished", result)
        if (folder / FAILURE).is_file():
            return State("failed", reason=_failure(folder))
        begun = any((folder / name).exists() for name in self.unfinished)
        return State("interrupted" if begun else "not begun")


def _failure(folder: Path) -> str:
    """Why a run has failed."""
    try:
        return read_record(folder / FAILURE, records.Failure)["reason"]
    except ValueError as error:
        return f"failed; why is not readable: {error}"


def open_folder(out: str | Path, config: AdapterSettings) -> Path:
    """The run's folder under `out`, made, with its configuration inside.

    Raises:
        CannotWrite: nothing can be written there.
    """
    folder = Path(out) / config.run_name()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).is_file():
        write_json(folder / CONFIG, {"schema": config.schema, "config": config.to_dict()})
    return folder


class Busy(OSError):
    """Another process is at the same run."""


class Diverged(ValueError):
    """The training loss became NaN or infinite."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from this run, and remove what a killed one has left half written.

    The system gives the lock back if the process is killed.

    Raises:
        Busy: another process has it.
        CannotWrite: nothing can be written to the folder.
    """
    lock = FileLock(folder / LOCK)
    with writing(folder / LOCK):
        taken = _take(lock)
    if not taken:
        raise Busy(f"another process is at the run in {folder}: wait for it, or choose another --out")
    try:
        _sweep(folder)
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether another process is at this run now."""
    lock = FileLock(folder / LOCK)
    with writing(folder / LOCK):
        taken = _take(lock)
        lock.release()
    return not taken


def _take(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True


def settle_precision(folder: Path, config: AdapterSettings) -> str:
    """The precision of this run: what was settled before, else what the device says now, kept in the folder.

    A run that is resumed, perhaps by a machine with other hardware, must keep the precision that it began with.

    Raises:
        ValueError: the folder's configuration is damaged, or of another schema.
    """
    content = read_record(folder / CONFIG, records.Settings, config.schema)
    if config.precision not in ("auto", content.get("precision", config.precision)):
        raise ValueError(
            f"{folder / CONFIG} has precision {content['precision']}, the run is of {config.precision}: move its "
            "folder away to run again"
        )
    if "precision" not in content:
        from abm_vision.runs.device import choose_precision, resolve_device  # loads torch, which a report does not need

        content["precision"] = choose_precision(config.precision, resolve_device(config.device))
        write_json(folder / CONFIG, content)
    return content["precision"]


def check_same_run(result: dict[str, Any], config: AdapterSettings, folder: Path) -> None:
    """Raise a ValueError if a result is of other settings than the run whose folder it lies in."""
    found = result["config"]
    other = [f"{name} {found.get(name)!r}" for name, value in config.used().items() if found.get(name) != value]
    if other:
        raise ValueError(
            f"{folder / RESULT} is of another run, it has {', '.join(other)}: move its folder away to run again"
        )


def remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files and folders of a run, those that are there."""
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name, ignore_errors=True)
        else:
            (folder / name).unlink(missing_ok=True)


def discard_unbegun(folder: Path) -> None:
    """Remove a run's folder in which nothing was begun, unless another process is at it."""
    if folder.is_dir() and {path.name for path in folder.iterdir()} <= {CONFIG, LOCK} and not is_locked(folder):
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove what a killed process has left half written: nobody else writes while this run's lock is held.

    But for a configuration, which is written before the lock is taken: it must have been there for a while.
    """
    for path in folder.glob(".*.part*"):
        with suppress(FileNotFoundError):
            if not path.name.startswith(f".{CONFIG}.") or time.time() - path.stat().st_mtime > ABANDONED:
                remove(folder, [path.name])


def write_adapter(
    folder: Path, model: PeftModel, card: str, write_more: Callable[[Path], None], **settings: Any
) -> None:
    """The adapter in peft's format with `abm.json`, a model card and more, as a folder that appears whole."""
    from abm_vision.abm.saving import save_adapter  # loads torch

    beside = folder / f".{ADAPTER}.{os.getpid()}.part"
    with writing(folder / ADAPTER):
        try:
            save_adapter(model, beside, card=card, **settings)
            write_more(beside)
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)
            os.replace(beside, folder / ADAPTER)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_failure(folder: Path, schema: int | str, reason: str) -> None:
    """Why the run did not finish; kept until it does."""
    now = datetime.now(timezone.utc).isoformat("T", "seconds")
    write_json(folder / FAILURE, {"schema": schema, "reason": reason, "time": now})
