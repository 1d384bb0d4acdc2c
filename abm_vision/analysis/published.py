"""Published VTAB-1K results of a ViT-B/16 pretrained on ImageNet-21k: top-1 in %, on the full test sets.

Values as github.com/synbol/Parameter-Efficient-Transfer-Learning-Benchmark collects them from the papers (Convpass as
in github.com/JieShibo/PETL-ViT, rounded); means are computed here. `OSU` rows are the re-runs with one code base by
github.com/OSU-MLB/ViT_PEFT_Vision (CVPR 2025), last epoch.
"""

from __future__ import annotations

import vtab_tasks
from abm_vision.runs.view import Published

_ORDER = (
    "cifar100 caltech101 dtd flowers102 pets svhn sun397 "
    "patch_camelyon eurosat resisc45 retinopathy "
    "clevr_count clevr_dist dmlab kitti_dist dsprites_loc dsprites_ori snorb_azim snorb_elev"
).split()


_PEEKED = "evaluates the test set every ten epochs and keeps the best"
_NOAH = "as printed by NOAH, whose code shows the running best test accuracy"
_UNKNOWN = "protocol not stated where it was collected"
_OSU = "last epoch; settings chosen on val200; pixels in [0, 1]; one seed"

_ROWS = (
    ("Full fine-tuning", 85.8, "settings chosen on val200",
     "68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1"),
    ("Linear probe", 0.0, "settings chosen on val200",
     "63.4 85.0 63.2 97.0 86.3 36.6 51.0 78.5 87.5 68.6 74.0 34.3 30.6 33.2 55.4 12.5 20.0 9.6 19.2"),
    ("BitFit", 0.10, "settings chosen on val200",
     "72.8 87.0 59.2 97.5 85.3 59.9 51.4 78.7 91.6 72.9 69.8 61.5 55.6 32.4 55.9 66.6 40.0 15.7 25.1"),
    ("VPT-Shallow", 0.08, "settings chosen on val200",
     "77.7 86.9 62.6 97.5 87.3 74.5 51.2 78.2 92.0 75.6 72.9 50.5 58.6 40.5 67.1 68.7 36.1 20.2 34.1"),
    ("VPT-Deep", 0.56, "settings chosen on val200",
     "78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8"),
    ("Adapter", 0.16, _NOAH,
     "69.2 90.1 68.0 98.8 89.9 82.8 54.3 84.0 94.9 81.9 75.5 80.9 65.3 48.6 78.3 74.8 48.5 29.9 41.6"),
    ("LoRA r8", 0.29, _NOAH,
     "67.1 91.4 69.4 98.8 90.4 85.3 54.0 84.9 95.3 84.4 73.6 82.9 69.2 49.8 78.5 75.7 47.1 31.0 44.0"),
    ("AdaptFormer", 0.16, _UNKNOWN,
     "70.8 91.2 70.5 99.1 90.9 86.6 54.8 83.0 95.8 84.4 76.3 81.9 64.3 49.3 80.3 76.3 45.7 31.7 41.1"),
    ("NOAH", 0.43, _NOAH,
     "69.6 92.7 70.2 99.1 90.4 86.1 53.7 84.4 95.4 83.9 75.8 82.8 68.9 49.9 81.7 81.8 48.3 32.8 44.2"),
    ("SSF", 0.21, "other weights (augreg); learning rate chosen per task",
     "69.0 92.6 75.1 99.4 91.8 90.2 52.9 87.4 95.9 87.4 75.5 75.9 62.3 53.3 80.6 77.3 54.9 29.5 37.9"),
    ("FacT-TK", 0.07, _PEEKED,
     "70.6 90.6 70.8 99.1 90.7 88.6 54.1 84.8 96.2 84.5 75.7 82.6 68.2 49.8 80.7 80.8 47.4 33.2 43.0"),
    ("RepAdapter", 0.22, _PEEKED,
     "72.4 91.6 71.0 99.2 91.4 90.7 55.1 85.3 95.9 84.6 75.9 82.3 68.0 50.4 79.9 80.4 49.2 38.6 41.0"),
    ("Convpass", None, _PEEKED,
     "72.3 91.2 72.2 99.2 90.9 91.3 54.9 84.2 96.1 85.3 75.6 82.3 67.9 51.3 80.0 85.9 53.1 36.4 44.4"),
    ("Hydra", 0.28, _UNKNOWN,
     "72.7 91.3 72.0 99.2 91.4 90.7 55.5 85.8 96.0 86.1 75.9 83.2 68.2 50.9 82.3 80.3 50.8 34.5 43.1"),
    ("GPS", 0.22, _UNKNOWN,
     "81.1 94.2 75.8 99.4 91.7 91.6 52.4 87.9 96.2 86.5 76.5 79.9 62.6 55.0 82.4 84.0 55.4 29.7 46.1"),
    ("Linear probe, OSU", 0.0, _OSU,
     "48.7 86.5 65.7 98.8 88.9 41.0 52.9 82.9 90.0 74.8 74.4 37.3 35.0 35.8 62.5 16.2 29.3 17.1 23.5"),
    ("LoRA, OSU", None, _OSU,
     "70.2 91.4 69.0 99.0 90.2 88.2 55.1 86.8 94.4 85.8 73.0 82.6 63.2 51.2 76.9 86.6 47.2 33.3 41.2"),
    ("LoRA, best test epoch, OSU", None, "as the other OSU rows, but for the epoch that is best on the test set",
     "70.5 92.6 69.8 99.1 90.5 88.5 55.5 87.5 94.9 85.9 75.7 82.9 63.9 51.8 79.9 86.6 47.2 33.4 42.5"),
    ("BitFit, OSU", None, _OSU,
     "75.1 89.4 70.2 98.8 90.3 91.2 54.2 85.8 94.6 85.0 70.8 77.0 63.0 50.9 78.9 78.6 53.2 29.9 34.3"),
    ("SSF, OSU", None, _OSU,
     "75.6 89.4 68.3 99.0 91.1 91.1 56.4 85.5 94.4 83.2 71.6 79.9 63.0 52.8 79.3 85.3 51.7 31.9 37.0"),
    ("RepAdapter, OSU", None, _OSU,
     "74.2 91.4 68.3 98.9 90.7 90.8 55.1 86.4 95.0 86.0 71.9 82.1 62.0 50.9 80.0 85.3 52.0 35.6 41.0"),
    ("Convpass, OSU", None, _OSU,
     "72.3 91.3 71.0 99.1 90.8 90.7 55.8 86.3 95.7 85.7 72.8 82.2 65.2 53.7 73.6 86.1 55.0 38.4 44.5"),
)  # fmt: skip


def _row(method: str, parameters: float | None, note: str, values: str) -> Published:
    found = dict(zip(_ORDER, map(float, values.split()), strict=True))
    return Published(method, parameters, {task: found[task] for task in vtab_tasks.TASKS}, note)


PUBLISHED = tuple(_row(*row) for row in _ROWS)
