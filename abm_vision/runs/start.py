"""A run's start: the adapter initialised, its reference tuned or loaded, its information loss measured."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel

from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.host import Backbone
from abm_vision.abm.loading import REMEDY, load_reference, read_settings
from abm_vision.abm.saving import ABM_FILE
from abm_vision.abm.tangent import InformationLoss, information_loss
from abm_vision.initializers import Needs, initialize_lora
from abm_vision.runs.device import autocast
from abm_vision.runs.folder import ADAPTER, RESULT, settle_precision
from abm_vision.runs.records import Tuned, read_record
from abm_vision.runs.settings import AdapterSettings, Settings, without_own_settings

REFERENCE = "reference"
Say = Callable[[str], None]
Tune = Callable[[Settings], Mapping[str, Any]]


class Ready(Protocol):
    """What a start needs of a run."""

    model: PeftModel
    device: torch.device
    precision: str

    @property
    def weights_sha256(self) -> str:
        """What a tuned reference must have been tuned on."""

    @property
    def backbone(self) -> Backbone:
        """The record of the model's family."""

    def calibration(self) -> Iterable[Any]:
        """Labelled batches on the device, of the shuffled training set from its beginning."""

    def diagnosis(self, seen: bool) -> list[Any]:
        """Batches to measure information loss on: those of the calibration, or some that it does not see."""


def start_adapter(
    ready: Ready, config: Settings, tune: Tune, seconds: dict[str, float], quiet: bool, diagnose: bool, say: Say
) -> dict[str, Any]:
    """Apply the start. Returns its report, its reference and, if asked for, the information loss around it.

    `tune` makes the run, and returns its result, that tunes a reference where none is given. What the stages take is
    added to `seconds`.
    """
    targets = list(adapted_layers(ready.model, "default"))
    before = _information_loss(ready, targets, seen=False) if diagnose else None
    with _reference(ready, config, tune, say) as reference:
        if reference and reference["seconds"] is not None:
            seconds["reference"] = reference["seconds"]
        with stopwatch(seconds)("init"), autocast(ready.device, ready.precision):
            report = initialize_lora(
                ready.model,
                config.init,
                ready.calibration(),
                config=config.init_config(),
                reference=REFERENCE if reference else None,
                backbone=ready.backbone,
                show_progress_bar=not quiet,
            )
    if report:
        say(f"{config.init:<9} {report.summary()}")
    loss = None
    if diagnose:
        after, seen = (_information_loss(ready, targets, seen=seen) for seen in (False, True))
        loss = {"before": before.to_dict(), "after": after.to_dict(), "after_on_seen": seen.to_dict()}
        say(
            f"{after}\nbefore the start {before.overall.loss:.4f}; after, on calibration samples "
            f"{seen.overall.loss:.4f}"
        )
    return {
        "report": report.to_dict() if report else None,
        "reference": reference,
        "information_loss": loss,
        "start": fingerprint(ready.model),
    }


def settle_device(device: torch.device, config: AdapterSettings, folder: Path, say: Say) -> str:
    """The run's precision on this device, as kept in its folder; peak memory counts from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    precision = settle_precision(folder, config)
    say(f"device    {device}, {precision}")
    return precision


def fingerprint(model: PeftModel) -> str:
    """A hash of every A and B."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_start(before: Mapping[str, Any], started: Mapping[str, Any], folder: Path) -> None:
    """A checkpoint fits only the start that it was trained from.

    Raises:
        ValueError: the start came out differently.
    """
    if before.get("start", started["start"]) != started["start"]:
        raise ValueError(
            f"the start of the run in {folder} comes out differently now (other threads, device or versions?), so "
            "its checkpoint does not fit; --rerun, or deleting its folder, starts afresh"
        )


def stopwatch(seconds: dict[str, float]) -> Callable[[str], Any]:
    """A context manager for every stage, whose time is added to `seconds`."""

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return stage


def _information_loss(ready: Ready, targets: list[str], seen: bool) -> InformationLoss:
    batches = ready.diagnosis(seen)
    adapted = adapted_layers(ready.model, "default")
    with autocast(ready.device, ready.precision):
        return information_loss(
            ready.model,
            batches,
            ready.backbone.loss_fn,
            unadapted=[name for name in targets if name not in adapted],  # EVA may give a layer rank 0
        )


@contextmanager
def _reference(ready: Ready, config: AdapterSettings, tune: Tune, say: Say) -> Iterator[dict[str, Any] | None]:
    """Beside the adapter, for a start that needs it, a tuned one: given, or tuned now by a run of its own.

    Yields its folder and the seconds that tuning took: its own start and training, None where they are not known.
    """
    if Needs.REFERENCE not in config.initializer.needs:
        yield None
        return
    given = config.abm_reference
    if given is None:
        say("reference tuned first, by the same run with init kaiming")
        given = tune(without_own_settings(config))["folder"]
    folder = Path(given)
    remedy = "give another reference, or its adapter folder alone"
    tuned = read_record(folder / RESULT, Tuned, remedy=remedy) if (folder / RESULT).is_file() else None
    adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    _check_weights(adapter, ready.weights_sha256)
    load_reference(ready.model, adapter, REFERENCE)
    try:
        cost = tuned["seconds"] if tuned else None
        seconds = sum(cost.get(stage, 0.0) for stage in ("reference", "init", "train")) if cost else None
        yield {"folder": str(given), "seconds": seconds}
    finally:
        ready.model.delete_adapter(REFERENCE)


def _check_weights(adapter: Path, sha256: str | None) -> None:
    """A reference that a run has tuned must have been tuned on the same weights; of others nothing is known."""
    if not (adapter / ABM_FILE).is_file():
        return
    recorded = read_settings(adapter).get("weights")
    if not recorded:
        return
    if not isinstance(recorded, dict) or not {"sha256", "location"} <= recorded.keys():
        raise ValueError(f"{adapter / ABM_FILE} has weights {recorded!r}, they must name sha256 and location: {REMEDY}")
    if recorded["sha256"] != sha256:
        raise ValueError(
            f"the reference {adapter} was tuned on {recorded['location']} (sha256 {recorded['sha256']}), this run has "
            f"weights of sha256 {sha256}: pass one that was tuned on the same weights"
        )
