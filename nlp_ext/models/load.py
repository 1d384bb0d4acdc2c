"""Pretrained language models and their tokenisers. Never from pickles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from abm_vision.runs.content import sha256_of
from abm_vision.runs.finite import check_finite
from nlp_ext import tiny
from nlp_ext.models import cached, gguf
from nlp_ext.models.packages import PACKAGES

# Models that need no hub, for messages.
EXAMPLES = {AutoModelForCausalLM: ("smollm2-135m", "tiny-llama"), AutoModelForSeq2SeqLM: ("tiny-t5",)}
_TOKENIZER_FILES = ("*token*", "*vocab*", "merges.txt", "*.model", "chat_template*")


@dataclass(frozen=True)
class Weights:
    """Where a model's weights come from.

    Attributes:
        location: name as it was given.
        revision: the hub's commit, None for others.
        sha256: hash of the safetensors files in the order of their names, in hexadecimal.
        tiny: whether it is a stand-in pretrained by this package.
        dequantised: the format of a GGUF file's weights, such as "Q4_1"; None for others.
    """

    location: str
    revision: str | None
    sha256: str
    tiny: bool
    dequantised: str | None = None

    def __str__(self) -> str:
        kind = " (tiny: a stand-in, pretrained here)" if self.tiny else f" at {self.revision}" if self.revision else ""
        kind += f" (dequantised from {self.dequantised})" if self.dequantised else ""
        return f"{self.location}{kind}, sha256 {self.sha256[:12]}"


def model_folder(name: str, *, show_progress_bar: bool = True) -> str:
    """Return what transformers' `from_pretrained` takes for a model: a folder, or a name on the hub as it is.

    Args:
        name: on the hub; a folder; a GGUF file, or a folder with one, which is dequantised once; a model that
            `python -m nlp_ext.models fetch` got; or a tiny model, which is pretrained if it is not in the cache.
        show_progress_bar: show a bar while a tiny model is pretrained.

    Raises:
        OSError: it was not fetched, or the cache cannot be written.
        ValueError: the GGUF file cannot be read.
    """
    if name in tiny.MODELS:
        return str(tiny.tiny_folder(name, show_progress_bar=show_progress_bar))
    if name in PACKAGES:
        return str(gguf.packaged_folder(name))
    file = gguf.gguf_file(Path(name).expanduser())
    return str(gguf.converted(file)) if file else name


def check_model(name: str, kind: Any, say: Callable[[str], None]) -> None:
    """Raise what `load_model` raises for a wrong name, before anything takes long; of the hub it reads a page.

    Args:
        name: as `model_folder` takes it.
        kind: as for `load_model`.
        say: receives a line if the model is a tiny one that is still to be pretrained.
    """
    if name not in tiny.MODELS or name not in EXAMPLES[kind]:
        _find(name, kind)
    elif not tiny.is_pretrained(name):
        say(f"weights   {name} is pretrained first, once: minutes on two cores")


def load_model(
    name: str, kind: Any, *, show_progress_bar: bool = True, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Weights]:
    """Load a model and its tokeniser.

    Args:
        name: as `model_folder` takes it.
        kind: `AutoModelForSeq2SeqLM` or `AutoModelForCausalLM`.
        show_progress_bar: show a bar while a tiny model is pretrained.
        options: passed to `from_pretrained`, such as dtype.

    Returns:
        The model in evaluation mode, its tokeniser, and where the weights come from.

    Raises:
        OSError: there is no such model, it is gated, or the hub cannot be reached.
        ValueError: the model is of another kind, its files are damaged or incomplete, or a weight is not finite.
    """
    place = _find(name, kind, show_progress_bar=show_progress_bar)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
        model, loading = kind.from_pretrained(place, use_safetensors=True, output_loading_info=True, **options)
        sha256 = sha256_of(_weights_files(Path(cached_file(place, "config.json")).parent))
    except OSError as error:
        raise OSError(_explained(name, error, " or ".join(EXAMPLES[kind]))) from error
    except (SafetensorError, RuntimeError) as error:  # a truncated file, or other shapes
        raise ValueError(f"the weights of {name} cannot be read ({' '.join(str(error).split())[:200]})") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} weights of a {type(model).__name__} ({missing[0]} and others): they would be "
            f"random. Give a model of that kind, such as {' or '.join(EXAMPLES[kind])}"
        )
    check_finite(model, f"the weights of {name}")
    revision = getattr(model.config, "_commit_hash", None)
    recipe = cached.recorded(Path(place)) if (Path(place) / cached.RECIPE).is_file() else {}
    weights = Weights(name, revision, sha256, name in tiny.MODELS, recipe.get("dequantised"))
    return model.eval(), tokenizer, weights


def _find(name: str, kind: Any, *, show_progress_bar: bool = False) -> str:
    """What `from_pretrained` takes for a model of this kind."""
    examples = " or ".join(EXAMPLES[kind])
    if name in tiny.MODELS and name not in EXAMPLES[kind]:  # which is not to be pretrained to learn this
        raise ValueError(f"{name} is a model of another type; one like {examples} is needed here")
    place = model_folder(name, show_progress_bar=show_progress_bar)
    try:
        config = AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:  # a ValueError where transformers lacks the model
        raise OSError(_explained(name, error, examples)) from error
    if type(config) not in kind._model_mapping:
        raise ValueError(f"{name} is a model of type {config.model_type}; one like {examples} is needed here")
    return place


def _explained(name: str, error: OSError | ValueError, example: str) -> str:
    causes = list(_causes(error))
    page = f"https://huggingface.co/{name}"
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{name} is gated: accept its licence at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return (
            f"there is no model {name} on the hub (or it is private, and HF_TOKEN is not that of a member): give a "
            f"name on the hub, a folder, or one that needs no hub ({example})"
        )
    reason = " ".join(str(error).split())
    if Path(name).is_dir():
        return f"the folder {name} holds no model that can be read ({reason})"
    return f"{name} cannot be read from the hub ({reason}): give a folder, or a model that needs no hub ({example})"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def model_content(name: str) -> dict[str, str]:
    """Hash a model's weights, configuration and tokeniser on this machine; nothing is loaded.

    Raises:
        OSError: they are not on this machine.
    """
    place = model_folder(name, show_progress_bar=False)
    folder = Path(cached_file(place, "config.json", local_files_only=True)).parent
    tokenizer = sorted({path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)})
    files = {"weights": _weights_files(folder), "model configuration": [folder / "config.json"], "tokenizer": tokenizer}
    return {part: f"sha256 {sha256_of(paths)}" if paths else "none" for part, paths in files.items()}


def _weights_files(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise OSError(f"no safetensors file in {folder}, and pickles are never loaded")
    return paths
