"""The origin of a run by content: files and the code of its initialisation; and checks that it has not changed."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from platformdirs import user_cache_path

from abm_vision.abm.files import read_object, write_json
from abm_vision.initializers import Initializer
from abm_vision.initializers.record import PACKAGE
from abm_vision.runs.settings import AdapterSettings

SETTLED = 2.0  # seconds: a file written just now may be written again with the same time stamp
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
Origin = dict[str, Any]  # names to hashes or other plain values

# -------------------------------------------------------------------------------------------------------- files


def cache_folder() -> Path:
    """Return `abm_lora` in the user's cache folder.

    Raises:
        RuntimeError: the user has no home.
    """
    return user_cache_path("abm_lora")


def remembered(paths: Sequence[Path], name: str, compute: Callable[[], str]) -> str:
    """Compute a value of files, and cache it while size, times and inode of every file are unchanged.

    The times include that of the last change of status, which no program can set: `cp -p` and `touch` do not hide a
    change. Processes may share the cache; without one the value is computed every time.

    Args:
        paths: the files.
        name: name of the value.
        compute: computes the value from the files.

    Raises:
        FileNotFoundError: one of the files is missing.
    """
    absolute, stats = [os.path.abspath(path) for path in paths], [os.stat(path) for path in paths]
    stamp = _hash([(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev) for s in stats])
    kept = cache_folder() / "hashes" / f"{_hash([name, absolute])}.json"
    with suppress(OSError, ValueError):  # missing or damaged
        found = read_object(kept, "it is made again")
        if found.get("stamp") == stamp and isinstance(found.get("value"), str):
            return found["value"]
    value = compute()
    if time.time() - max(max(s.st_mtime, s.st_ctime) for s in stats) > SETTLED:
        with suppress(OSError):  # a cache that cannot be written only costs time
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_json(kept, {"stamp": stamp, "value": value})
    return value


def sha256_of(paths: Sequence[Path]) -> str:
    """Hash the bytes of files, one after the other, in hexadecimal; cached by `remembered`."""
    return remembered(paths, "sha256", lambda: _sha256(paths))


def _sha256(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------- code


def initialisation(config: AdapterSettings) -> Origin:
    """Return the version of a run's initialisation, and the content of its reference.

    Raises:
        FileNotFoundError: the reference is no adapter's folder.
    """
    found: Origin = {"initialisation": version_of(config.initializer)}
    if config.abm_reference is not None:
        folder = Path(config.abm_reference)
        places = (folder / "adapter" / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
        weights = next((p for p in places if p.is_file()), places[1])
        files = [weights, weights.with_name(ADAPTER_CONFIG)]
        for file in reversed(files):
            if not file.is_file():
                raise FileNotFoundError(f"no {file.name} in {file.parent}: pass a folder that save_adapter wrote")
        found["reference"] = f"sha256 {sha256_of(files)}"
    return found


def version_of(row: Initializer) -> str:
    """What a row says of itself, else its `version`; of one from a plugin its source files, too.

    Raises:
        ValueError: there is no source file.
    """
    if row.version is not None:
        return row.version
    if row.plugin is None:
        return version(row.apply)
    try:
        return f"source {_hash(_sources(row.plugin))[:12]}, {version(row.apply)}"
    except (AttributeError, OSError, TypeError) as error:
        raise ValueError(f"the source of init {row.name} cannot be read ({error}): give its row a version") from error


def _sources(module: str) -> list[str]:
    """The text of a module's file, and of all others of its package."""
    package = sys.modules[module.partition(".")[0]]
    folders = [Path(folder) for folder in getattr(package, "__path__", ())]
    files = sorted(file for folder in folders for file in folder.rglob("*.py")) or [Path(package.__file__)]
    return [file.read_text(encoding="utf-8") for file in files]


def version(*things: Any) -> str:
    """Hash code and all that it uses of its own package and of this one, and name the versions of others that it calls.

    Comments, documentation, annotations and layout do not count. torch is not named: every result has its version.

    Args:
        things: functions, classes, or dataclass instances, whose fields count.
    """
    packages, seen = {_package(things[0]), PACKAGE}, set()
    parts: list[tuple[str, str]] = []
    versions: dict[str, str] = {}
    waiting: list[tuple[str, Any]] = [("", thing) for thing in things]
    while waiting:
        name, found = waiting.pop()
        if isinstance(found, (dict, list, tuple)):
            pairs = found.items() if isinstance(found, dict) else enumerate(found)
            waiting += [(f"{name} {key}", value) for key, value in pairs]
        elif isinstance(found, (bool, int, float, str, type(None))):
            parts.append((name, repr(found)))
        elif id(found) in seen:
            continue
        elif is_dataclass(found) and not isinstance(found, type):
            seen.add(id(found))
            waiting += [("", type(found)), *((f"{name}.{key}", value) for key, value in vars(found).items())]
        elif not isinstance(found, (FunctionType, type)):
            continue
        elif _package(found) in packages:
            seen.add(id(found))
            tree = _tree(found)
            parts.append((f"{found.__module__}.{found.__qualname__}", ast.unparse(tree)))
            waiting += _used(found, tree)
        elif isinstance(found, FunctionType) and _package(found) not in {*sys.stdlib_module_names, "torch"}:
            with suppress(metadata.PackageNotFoundError):
                versions[_package(found)] = metadata.version(_package(found))
    names = "".join(f", {name} {number}" for name, number in sorted(versions.items()))
    return f"code {_hash(sorted(parts))[:12]}{names}"


def _package(thing: Any) -> str:
    module = thing.__name__ if isinstance(thing, ModuleType) else thing.__module__
    return (module or "").partition(".")[0]


@cache
def _tree(thing: Any) -> ast.AST:
    """The code of a function or class without documentation and annotations; of its whole file for an expression."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except SyntaxError:  # a lambda in the middle of an expression
        tree = ast.parse(inspect.getsource(sys.modules[thing.__module__]))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value = ast.Constant(...)
    return tree


def _used(thing: Any, tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """The values of the names in a function or class, and of its closure.

    Of a module's variables only constants (in capitals) count: others may change while a program runs.
    """
    around = vars(sys.modules[thing.__module__])
    pairs: list[tuple[str, Any]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            pairs.append((node.id, around.get(node.id)))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = around.get(node.value.id)
            if isinstance(module, ModuleType) and _package(module) == _package(thing):
                pairs.append((node.attr, getattr(module, node.attr, None)))
        elif isinstance(node, ast.ImportFrom) and not node.level:  # where it is used
            module = import_module(node.module)
            pairs += [(alias.name, getattr(module, alias.name, None)) for alias in node.names]
    yield from ((name, found) for name, found in pairs if isinstance(found, (FunctionType, type)) or name.isupper())
    if isinstance(thing, FunctionType):
        yield from inspect.getclosurevars(thing).nonlocals.items()


# -------------------------------------------------------------------------------------------------------- checks


def check_origin(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Check that a run is not resumed or reused with other content than it was made with.

    Raises:
        ValueError: the content differs; the message names the difference.
    """
    differing = [name for name, value in now.items() if before.get(name) != value]
    if differing:
        words = ", ".join(
            f"{name} ({shortened(before.get(name))} then, {shortened(now[name])} now)" for name in differing
        )
        raise ValueError(
            f"the run in {folder} was made with other content: {words}. Restore it, choose another --out, or make the "
            "run afresh (--rerun, or delete its folder)"
        )


def check_finished(before: Mapping[str, Any], parts: Iterable[Callable[[], Mapping[str, Any]]], folder: Path) -> None:
    """Check the same of a finished run, whose data and weights may be missing by now.

    Its result is valid then; a warning says what could not be checked. Everything else is checked.

    Args:
        before: the origin in the result.
        parts: each computes a part of the present origin, without the network and without a model.
        folder: the run's folder.

    Raises:
        ValueError: the content differs.
    """
    found: Origin = {}
    absent = []
    for part in parts:
        try:
            found |= part()
        except OSError as error:
            absent.append(str(error).partition("\n")[0])
    check_origin(before, found, folder)
    if absent:
        reasons = "; ".join(dict.fromkeys(absent))
        warnings.warn(f"the run in {folder} could not be checked whole: {reasons}", stacklevel=3)


def shortened(value: Any) -> str:
    """Shorten hashes to their first 12 digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", "none" if value is None else str(value))
