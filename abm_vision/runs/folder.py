"""A run's folder: configuration, lock, result, adapter, failure. Every file is whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from peft import PeftModel

from abm_vision.abm.files import read_object, write_json, writing
from abm_vision.abm.saving import save_adapter
from abm_vision.runs.device import choose_precision, resolve_device
from abm_vision.runs.settings import AdapterSettings

CONFIG, RESULT, ADAPTER = "config.json", "result.json", "adapter"
LOCK, FAILURE = ".lock", "failure.json"


def open_folder(out: str | Path, config: AdapterSettings) -> Path:
    """The run's folder under `out`, made, with its configuration inside.

    Raises:
        CannotWrite: nothing can be written there.
    """
    folder = Path(out) / config.run_name()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / CONFIG).is_file():
        write_json(folder / CONFIG, {"schema": config.schema, "config": asdict(config)})
    return folder


class Busy(OSError):
    """Another process is at the same run."""


class Diverged(ValueError):
    """The training loss became NaN or infinite."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from this run. The system gives the lock back if the process is killed.

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

    A run that is taken up again, perhaps by a machine with other hardware, must go on as it began.
    """
    content = read_json(folder / CONFIG)
    if "precision" not in content:
        content["precision"] = choose_precision(config.precision, resolve_device(config.device))
        write_json(folder / CONFIG, content)
    return content["precision"]


def read_result(
    folder: Path, schema: int | str, entries: Collection[str], settings: Collection[str] = ()
) -> dict[str, Any] | None:
    """The result of a finished run, None for one that is not.

    Raises:
        ValueError: it was written under another schema, or lacks one of `entries` or (in its configuration) `settings`.
    """
    path = folder / RESULT
    if not path.is_file():
        return None
    result = read_json(path)
    if result.get("schema") != schema:
        raise ValueError(
            f"{path} has schema {result.get('schema')}, this version reads {schema}; move it away to run again"
        )
    config = result["config"] if isinstance(result.get("config"), dict) else {}
    absent = sorted(set(entries) - set(result)) or sorted(set(settings) - set(config))
    if absent:
        raise ValueError(f"{path} is no whole result, it lacks {', '.join(absent)}; move it away to run again")
    return result


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a run's folder.

    Raises:
        ValueError: it is damaged; the message names it.
    """
    return read_object(path, "move it away to run again")


def write_adapter(folder: Path, model: PeftModel, card: str, **settings: Any) -> None:
    """The adapter in peft's format with `abm.json` and a model card, as a folder that appears whole."""
    beside = folder / f".{ADAPTER}.{os.getpid()}.part"
    with writing(folder / ADAPTER):
        try:
            save_adapter(model, beside, **settings)
            (beside / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(folder / ADAPTER, ignore_errors=True)
            os.replace(beside, folder / ADAPTER)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def write_failure(folder: Path, schema: int | str, reason: str) -> None:
    """Why the run did not finish; kept until it does."""
    now = datetime.now(timezone.utc).isoformat("T", "seconds")
    write_json(folder / FAILURE, {"schema": schema, "reason": reason, "time": now})


def check_origin(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """A run must not go on with other data or weights than it began with: `auto` may find others meanwhile.

    Raises:
        ValueError: something differs.
    """
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"the run in {folder} began with {name} {before[name]}, now it is {value}; --rerun, or deleting its "
                "folder, starts afresh"
            )
