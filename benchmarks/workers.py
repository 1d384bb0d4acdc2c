"""What `--workers` of `abm-tune` brings: seconds of a training epoch on photographs that are augmented.

    python benchmarks/workers.py

CIFAR-10's photographs of `photographs.py` are small; they are written anew as JPEG with 500 px a side, nearer to what
people have. DINOv2 ViT-S/14 at 70 px, two epochs each, the second of which counts; the settings take turns twice.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from photographs import write_cifar10
from PIL import Image

from abm_vision.abm.files import write_json
from abm_vision.runs.device import choose_precision, resolve_device
from abm_vision.runs.provenance import environment
from abm_vision.tune import make_config, run

RESULT = Path(__file__).parent / "results" / "workers.json"
SETTINGS = [("none", 0), ("light", 0), ("light", 1), ("light", 2), ("timm", 0), ("timm", 2)]
SIDE = 500  # pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    seconds: dict[tuple[str, int], list[float]] = {setting: [] for setting in SETTINGS}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "photographs")
        write_cifar10(folder, train=50, val=5, test=5)
        for path in folder.rglob("*.png"):
            Image.open(path).resize((SIDE, SIDE)).save(path.with_suffix(".jpg"), quality=90)
            path.unlink()
        for turn in range(2):
            for augment, workers in SETTINGS[:: -1 if turn else 1]:
                settings: dict[str, Any] = {"augment": augment, "workers": workers, "epochs": 2, "image_size": 70}
                config = make_config(data=str(folder), init="kaiming", seed=turn, **settings)
                result = run(config, Path(place, f"{turn}-{augment}-{workers}"), quiet=True)
                seconds[augment, workers].append(result["seconds_per_epoch"][1])
                print(augment, workers, seconds[augment, workers], flush=True)
    rows = [
        {"augment": augment, "workers": workers, "seconds": statistics.median(found), "all": found}
        for (augment, workers), found in seconds.items()
    ]
    device = resolve_device("auto")
    about = {"precision": choose_precision("auto", device), "images": 500, "environment": environment(str(device))}
    write_json(
        args.out, {"command": " ".join(["python", "benchmarks/workers.py", *sys.argv[1:]]), **about, "rows": rows}
    )


if __name__ == "__main__":
    main()
