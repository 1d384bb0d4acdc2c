"""Devices and precision of a run."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


def resolve_device(name: str) -> torch.device:
    """Choose a device by name; `auto` is CUDA, then MPS, then CPU.

    Raises:
        ValueError: there is no such device on this machine.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available[:0] = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device(available[0])
    full = "cuda:0" if name == "cuda" else name
    if full not in available:
        raise ValueError(f"device is {name!r}; this machine has {', '.join(available)}")
    return torch.device(full)


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether the hardware multiplies in bfloat16: CUDA from compute capability 8.0 on, x86 with AVX512-BF16.

    The device is queried and never timed: a busy machine must not change the result of a seed.
    """
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    # Public only after torch 2.10, in get_capabilities().
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def choose_precision(precision: str, device: torch.device) -> str:
    """Return "bf16" or "fp32"; "auto" depends on the device."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    return precision


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Make a context of bfloat16 autocast for "bf16", of nothing for "fp32"."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def peak_memory(device: torch.device) -> float | None:
    """Return the peak memory in MiB: on CUDA torch's allocations on the device, elsewhere the resident process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
