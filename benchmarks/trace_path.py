"""What a reader has to follow: the files and functions that one batch of the main command, and one core call, pass.

    python benchmarks/trace_path.py

Counted by `sys.setprofile` over one step of training (and a matching of one step): functions of this repository in the
order of their first call; a return is a change to a file that was there before. Smaller is easier to read.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from inspect import CO_OPTIMIZED
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("abm_vision", "nlp_ext", "vtab_tasks")


def passed(call: Callable[[], object]) -> list[tuple[str, str]]:
    """(file, function) of this repository in the order of their first call."""
    found: dict[tuple[str, str], None] = {}

    def note(frame: object, event: str, _: object) -> None:
        if event == "call":
            code = frame.f_code
            # Bodies of modules and classes, which run at the import, are not optimised code.
            if code.co_filename.startswith(str(ROOT)) and code.co_flags & CO_OPTIMIZED and code.co_name[0] != "<":
                found.setdefault((code.co_filename.removeprefix(f"{ROOT}/"), code.co_qualname))

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [(file, name) for file, name in found if file.startswith(PACKAGES)]


def counts(path: list[tuple[str, str]]) -> tuple[int, int, int]:
    """Files, functions, and returns to a file that was there before."""
    seen: set[str] = set()
    returns, last = 0, ""
    for file, _ in path:
        returns += file != last and file in seen
        seen.add(file)
        last = file
    return len(seen), len(path), returns


def main_command() -> None:
    from abm_vision.vtab.__main__ import main

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        code = main(
            "--task dsprites_loc --init abm --model test_vit --weights none --image-size 32 --epochs 1 --quiet "
            "--batch-size 1000 --abm-steps 1 --abm-samples 8 --test-images 20 --rank 4 --device cpu".split()
            + ["--out", out]
        )
    assert code == 0


def core_call() -> Callable[[], object]:
    import timm
    import torch

    from abm_vision import ABMConfig, add_lora, initialize_lora_abm_weights

    model = add_lora(timm.create_model("test_vit", num_classes=5, img_size=32), rank=4)
    batches = [torch.randn(8, 3, 32, 32)]
    return lambda: initialize_lora_abm_weights(model, batches, ABMConfig(steps=1, samples=8), show_progress_bar=False)


if __name__ == "__main__":
    print(f"{'':<40}{'files':>6}{'functions':>10}{'returns':>8}")
    for name, call in {"core call, one step": core_call(), "main command, one batch": main_command}.items():
        path = passed(call)
        files, functions, returns = counts(path)
        print(f"{name:<40}{files:>6}{functions:>10}{returns:>8}")
        if "--list" in sys.argv:
            print(*(f"    {file}:{function}" for file, function in path), sep="\n")
