"""One's own images as an analysis sees them: top-1 on the test part, or on validation where there is none."""

from __future__ import annotations

from abm_vision.runs.view import Data, Kind, Score, Selection, View
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
    score=Score(
        key="top1",
        name="top-1",
        split="held-out",
        value=lambda result: scored(result)["top1"],
        unit="%",
        scale=100.0,
        details=lambda result: {key: scored(result)[key] for key in ("correct", "count", "split")},
        moment="at its best epoch on validation",
    ),
    data=Data(
        kinds=(Kind("real", "Your images", (SUBJECT,), note=_NOTE),),
        source=lambda result: result["data"]["train"]["source"],
        content=lambda result: {
            name: value for name, value in result["origin"].items() if name.endswith((" images", " labels"))
        },
        counted=lambda result: (scored(result)["count"],) * 2,
        samples="images",
        seeded=True,
    ),
    selection=Selection({"evaluate": "val"}, split="validation"),
    task=lambda config: SUBJECT,
    model=lambda settings: f"{settings['model']}, {settings['image_size']} px",
    asked=("data", "workers"),
)
