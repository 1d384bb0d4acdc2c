"""Peak memory of a piece of work, on CPU (Linux) or CUDA."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(work: Callable[[], object], device: str) -> float:
    """Measure the MiB that `work` needs at its peak beyond what the process held before."""
    if device == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed pages that the process still holds would hide part of the need
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    held = _high_water_mark()
    work()
    return (_high_water_mark() - held) / 2**20


def _high_water_mark() -> int:
    """Peak resident bytes of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
