"""Where a number comes from: versions, commit, device."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("abm-lora", "torch", "torchvision", "timm", "peft", "numpy", "transformers", "trl", "datasets")
HERE = Path(__file__).resolve().parent


def environment(device: str) -> dict[str, Any]:
    """Versions, commit, device and threads, as plain JSON values, to be kept with every result."""
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": git_commit(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # this package itself, run from a checkout without installing it
        return None


def git_commit() -> dict[str, Any] | None:
    """The checkout's commit and whether tracked files differ from it; None where git does not track this file."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # an installed package may lie in another's checkout
        return {"id": git("rev-parse", "HEAD"), "modified": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):  # no git, not tracked, or no commit yet
        return None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # ROCm, or a container without the tool
        return "unknown"


def device_name(device: str) -> str:
    """The accelerator's or the processor's own name; of a GPU with driver and CUDA."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} (driver {_driver()}, CUDA {torch.version.cuda})"
    if device == "mps":
        return f"Apple {platform.processor() or platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"
