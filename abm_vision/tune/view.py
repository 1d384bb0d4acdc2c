"""One's own images as an analysis sees them: top-1 on the test part, or on validation where there is none."""

from __future__ import annotations

from abm_vision.analysis.view import Kind, View
from abm_vision.tune.config import SUBJECT
from abm_vision.tune.results import KEPT, scored

_NOTE = (
    "Without a test part the score is that of validation, which has chosen the epoch, and is a little too good for it."
)

VIEW = View(
    program="abm-tune",
    name="Your images",
    kept=KEPT,
    harness="abm_vision.tune.harness:HARNESS",
    place="data",
    key="top1",
    score="top-1",
    split="held-out",
    unit="%",
    value=lambda result: scored(result)["top1"],
    scale=100.0,
    limits=(0, 100),
    details=lambda result: {key: scored(result)[key] for key in ("top1", "correct", "count", "split")},
    counted=lambda result: (scored(result)["count"],) * 2,
    samples="images",
    moment="at its best epoch on validation",
    kinds=(Kind("real", "Your images", (SUBJECT,), note=_NOTE),),
    kind=lambda result: "real",
    sources=lambda result: dict.fromkeys(("training data", "held-out data"), result["data"]["train"]["source"]),
    content=lambda result: {
        name: value for name, value in result["origin"].items() if name.endswith((" images", " labels"))
    },
    selection={"evaluate": "val"},
    selection_split="validation",
    seeded=True,
    asked=("data", "workers"),
    task=lambda config: SUBJECT,
    model=lambda settings: f"{settings['model']}, {settings['image_size']} px",
)
