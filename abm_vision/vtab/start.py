"""A run's start: the adapter initialised, its reference tuned or loaded, its information loss measured."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from abm_vision.abm.adapters import ABM_FILE, load_reference, read_settings
from abm_vision.abm.backbone import find_backbone
from abm_vision.abm.gradient import adapted_layers
from abm_vision.abm.tangent import InformationLoss, information_loss
from abm_vision.initializers import get_initializer, initialize_lora
from abm_vision.vtab import results
from abm_vision.vtab.config import RunConfig, uses
from abm_vision.vtab.data import shuffled
from abm_vision.vtab.setup import Say, Setup, stopwatch
from abm_vision.vtab.train import autocast
from abm_vision.weights import WeightSource

DIAGNOSIS_IMAGES, DIAGNOSIS_BATCH = 64, 8  # a batch's activations and one gradient a layer must fit into memory
REFERENCE = "reference"
Tune = Callable[[RunConfig], dict[str, Any]]


def start_adapter(
    setup: Setup, config: RunConfig, tune: Tune, seconds: dict[str, float], quiet: bool, diagnose: bool, say: Say
) -> dict[str, Any]:
    """Apply the start. Returns its report, its reference and, if asked for, the information loss around it.

    `tune` makes the run, and returns its result, that tunes a reference where none is given. What the stages take is
    added to `seconds`.
    """
    targets = list(adapted_layers(setup.model, "default"))
    before = _information_loss(setup, config, targets) if diagnose else None
    with _reference(setup.model, setup.weights, config, tune, say) as reference:
        if reference and reference["seconds"] is not None:
            seconds["reference"] = reference["seconds"]
        with stopwatch(seconds)("init"), autocast(setup.device, setup.precision):
            report = initialize_lora(
                setup.model,
                config.init,
                setup.images.batches(min(config.batch_size, config.abm_samples), config.seed, 0),
                config=config.abm(),
                align=config.align(),
                reference=REFERENCE if reference else None,
                show_progress_bar=not quiet and sys.stderr.isatty(),
            )
    if report:
        say(f"{config.init:<9} {report.summary()}")
    loss = None
    if diagnose:
        after, seen = (_information_loss(setup, config, targets, seen=seen) for seen in (False, True))
        loss = {"before": before.to_dict(), "after": after.to_dict(), "after_on_seen": seen.to_dict()}
        say(
            f"{after}\nbefore the start {before.overall.loss:.4f}; after, on calibration images {seen.overall.loss:.4f}"
        )
    return {
        "report": report.to_dict() if report else None,
        "reference": reference,
        "information_loss": loss,
        "start": _fingerprint(setup.model),
    }


def _fingerprint(model: PeftModel) -> str:
    """A hash of every A and B."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            digest.update(name.encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _information_loss(setup: Setup, config: RunConfig, targets: Sequence[str], seen: bool = False) -> InformationLoss:
    """On the calibration images if `seen`, else on training images from the other end of the shuffled set.

    Those the start does not see (though a tuned reference has).
    """
    free = len(setup.images) - config.abm_samples
    if free < DIAGNOSIS_IMAGES:
        raise ValueError(
            f"diagnose needs {DIAGNOSIS_IMAGES} training images that the start does not see; abm_samples "
            f"{config.abm_samples} leaves {max(0, free)}"
        )
    order = torch.cat(shuffled(len(setup.images), len(setup.images), config.seed, 0))
    chosen = order[: config.abm_samples] if seen else order[-DIAGNOSIS_IMAGES:]
    batches = [setup.images.select(k) for k in chosen.split(DIAGNOSIS_BATCH)]
    adapted = adapted_layers(setup.model, "default")
    with autocast(setup.device, setup.precision):
        return information_loss(
            setup.model,
            batches,
            find_backbone(setup.model).loss_fn,
            unadapted=[name for name in targets if name not in adapted],  # EVA may give a layer rank 0
        )


@contextmanager
def _reference(
    model: PeftModel, weights: WeightSource, config: RunConfig, tune: Tune, say: Say
) -> Iterator[dict[str, Any] | None]:
    """Beside the adapter, for a start that needs it, a tuned one: given, or tuned now by a run of its own.

    Yields its folder and the seconds that tuning took: its own start and training, None where they are not known.
    """
    if "reference" not in get_initializer(config.init).needs:
        yield None
        return
    given = config.abm_reference
    if given is None:
        say("reference tuned first, by the same run with init kaiming")
        given = tune(_without_own_settings(config))["folder"]
    folder = Path(given)
    tuned = results.read_result(folder)
    adapter = folder / results.ADAPTER if (folder / results.ADAPTER).is_dir() else folder
    _check_weights(adapter, weights)
    load_reference(model, adapter, REFERENCE)
    try:
        cost = tuned["seconds"] if tuned else None
        seconds = sum(cost.get(stage, 0.0) for stage in ("reference", "init", "train")) if cost else None
        yield {"folder": str(given), "seconds": seconds}
    finally:
        model.delete_adapter(REFERENCE)


def _without_own_settings(config: RunConfig) -> RunConfig:
    """The same run with peft's default start; settings that it does not use are the defaults, so that it is shared."""
    unused = {f.name: f.default for f in fields(RunConfig) if not uses("kaiming", f.name)}
    return replace(config, init="kaiming", **unused)


def _check_weights(adapter: Path, weights: WeightSource) -> None:
    """A reference that a run has tuned must have been tuned on the same weights; of others nothing is known."""
    if not (adapter / ABM_FILE).is_file():
        return
    recorded = read_settings(adapter).get("weights")
    if recorded and recorded["sha256"] != weights.sha256:
        raise ValueError(
            f"the reference {adapter} was tuned on {recorded['location']} (sha256 {recorded['sha256']}), this run has "
            f"{weights}: pass one that was tuned on the same weights"
        )
