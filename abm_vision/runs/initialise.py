"""The initialisation of a run's adapter: its reference tuned or loaded, its information loss measured around it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel

from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.loading import REMEDY, load_reference, read_settings
from abm_vision.abm.saving import ABM_FILE
from abm_vision.abm.tangent import InformationLoss, information_loss
from abm_vision.initializers import BASELINE, Needs, initialize_lora
from abm_vision.runs.device import autocast
from abm_vision.runs.folder import RESULT, adapter_folder
from abm_vision.runs.harness import Prepared
from abm_vision.runs.records import AFRESH, Tuned, read_record
from abm_vision.runs.settings import AdapterSettings, without_own_settings

REFERENCE = "reference"
Tune = Callable[[AdapterSettings], Mapping[str, Any]]


def initialise(run: Prepared, tune: Tune, diagnose: bool) -> dict[str, Any]:
    """Initialise the adapter; what the stages take is added to the run's seconds.

    Args:
        run: prepared.
        tune: makes the run, and returns its result, that tunes a reference where none is given.
        diagnose: measure the information loss before and after.

    Returns:
        Its report, its reference, the information loss if it is asked for, and, as `start`, a fingerprint.
    """
    targets = list(adapted_layers(run.model, "default"))
    if diagnose:
        run.session.say("diagnosis information loss, three times: before the initialisation, and twice after it")
    before = _information_loss(run, targets, seen=False) if diagnose else None
    with _reference(run, tune) as reference:
        if reference and reference["seconds"] is not None:
            run.seconds["reference"] = reference["seconds"]
        with run.stage("init"), autocast(run.device, run.precision):
            report = initialize_lora(
                run.model,
                run.config.init,
                run.calibration(),
                config=run.config.init_config(),
                reference=REFERENCE if reference else None,
                backbone=run.backbone,
                show_progress_bar=not run.session.quiet,
            )
    if report:
        run.session.say(f"{run.config.init:<9} {report.summary()}")
    loss = None
    if diagnose:
        after, seen = (_information_loss(run, targets, seen=seen) for seen in (False, True))
        loss = {"before": before.to_dict(), "after": after.to_dict(), "after_on_seen": seen.to_dict()}
        run.session.say(
            f"{after}\nbefore the initialisation {before.overall.loss:.4f}; after, on calibration samples "
            f"{seen.overall.loss:.4f}"
        )
    return {
        "report": report.to_dict() if report else None,
        "reference": reference,
        "information_loss": loss,
        "start": fingerprint(run.model),
    }


def fingerprint(model: PeftModel) -> str:
    """A hash of every A and B."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_same_initialisation(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise an error if a checkpoint was trained from another initialisation.

    Raises:
        ValueError: it came out differently.
    """
    if before.get("start", now["start"]) != now["start"]:
        raise ValueError(
            f"the initialisation of the run in {folder} comes out differently now (other threads, device or "
            f"versions?), so its checkpoint does not fit; {AFRESH}"
        )


def _information_loss(run: Prepared, targets: list[str], seen: bool) -> InformationLoss:
    batches = run.diagnosis(seen)
    adapted = adapted_layers(run.model, "default")
    with autocast(run.device, run.precision):
        return information_loss(
            run.model,
            batches,
            run.backbone.loss_fn,
            unadapted=[name for name in targets if name not in adapted],  # EVA may give a layer rank 0
        )


@contextmanager
def _reference(run: Prepared, tune: Tune) -> Iterator[dict[str, Any] | None]:
    """Beside the adapter, for an initialisation that needs it, a tuned one: given, or tuned now by a run of its own.

    Yields its folder and the seconds that tuning took: its own initialisation and training, None where
    they are not known.
    """
    if Needs.REFERENCE not in run.config.initializer.needs:
        yield None
        return
    given = run.config.abm_reference
    if given is None:
        run.session.say(f"reference tuned first, by the same run with init {BASELINE}")
        given = tune(without_own_settings(run.config))["folder"]
    folder = Path(given)
    remedy = "give another reference, or its adapter folder alone"
    tuned = read_record(folder / RESULT, Tuned, remedy=remedy) if (folder / RESULT).is_file() else None
    adapter = adapter_folder(folder)
    _check_weights(adapter, run.weights_sha256)
    load_reference(run.model, adapter, REFERENCE)
    try:
        cost = tuned["seconds"] if tuned else None
        seconds = sum(cost.get(stage, 0.0) for stage in ("reference", "init", "train")) if cost else None
        yield {"folder": str(given), "seconds": seconds}
    finally:
        run.model.delete_adapter(REFERENCE)


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
