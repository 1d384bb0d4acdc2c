"""The spine: one run of any harness, from its settings to its result."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from abm_vision.abm.files import write_json
from abm_vision.drawing import save_figure
from abm_vision.initializers import Properties
from abm_vision.runs import epochs
from abm_vision.runs import folder as files
from abm_vision.runs.content import check_finished, check_origin
from abm_vision.runs.device import peak_memory
from abm_vision.runs.figures import draw_information_loss, draw_training
from abm_vision.runs.folder import ADAPTER, CURVES, FAILURE, INFORMATION_LOSS, RESULT
from abm_vision.runs.harness import Checkpoint, Harness, Prepared, Request, Run, Session, silent
from abm_vision.runs.initialise import Tune, check_same_initialisation, initialise
from abm_vision.runs.log import LOGS
from abm_vision.runs.provenance import environment
from abm_vision.runs.settings import AdapterSettings


def run(harness: Harness, config: AdapterSettings, session: Session) -> dict[str, Any]:
    """Adapt a pretrained model, score it once, and write everything into the run's folder.

    A finished run is read, not repeated. An interrupted one is resumed from its last checkpoint, with the same result,
    bit for bit on CPU.

    Args:
        harness: what differs between modalities.
        config: the settings.
        session: how it is run.

    Returns:
        The content of `result.json`, with `folder` added.

    Raises:
        Busy: another process is at this run.
        ValueError, OSError: as the parts of the run do, each with one message.
    """
    processes = harness.processes(config)
    session = session if processes.main else replace(session, say=silent)
    folder = Path(session.out) / config.run_name()
    request = Request(config=config, folder=folder, session=session, processes=processes)
    with ExitStack() as stack:
        if processes.main:
            files.open_folder(session.out, config)
            stack.enter_context(files.locked(folder))
        processes.wait()
        finished = None if session.rerun else harness.kept.read(folder)
        if finished is None:
            _write(harness, request, _make(harness, request))
        else:
            _check(harness, request, finished)
            _complete(harness, request, finished)
        if session.extras:
            _add_extras(harness, request)
        processes.wait()
        return {**harness.kept.read(folder), "folder": str(folder)}


# ------------------------------------------------------------------------------------------------- a run that is made


def _make(harness: Harness, request: Request) -> dict[str, Any]:
    run = _prepare(harness, request)
    checkpoint = None if run.session.rerun else harness.resume(run)
    if checkpoint is None:  # only now: what is there is lost for a run that can be made
        _clear(harness, run)
    run = harness.measure_pretrained(run, checkpoint)
    notes = _initialise(harness, run, checkpoint)
    if checkpoint:
        run.session.say(f"resumed   after {_place(checkpoint, run.config.epochs)}")
    progress = harness.train(run, notes, checkpoint)
    run.seconds["train"] = sum(progress.seconds)
    scored = harness.score(run, progress)
    result = {
        "schema": run.config.schema,
        "config": run.config.to_dict(),
        "origin": run.origin,
        "precision": run.precision,
        "trainable_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
        "abm": notes.get("report"),
        "reference": notes.get("reference"),
        "information_loss": notes["information_loss"],
        **scored,
        "loss_per_step": progress.losses,
        "seconds_per_epoch": progress.seconds,
        "seconds": run.seconds,
        "peak_memory_mib": peak_memory(run.device),
        "environment": environment(str(run.device)),
        "reference_only": run.session.reference_only,
    }
    if run.config.initializer.needs:
        run.session.say(f"{run.config.init:<9} {_cost(result)}")
    state_dict = run.processes.gather(run.model)  # which all of them must call
    if run.processes.main:
        settings = harness.settings(result)
        more = partial(harness.beside_adapter, run)
        files.write_adapter(run.folder, run.model, harness.card(result), more, state_dict=state_dict, **settings)
    return result


def _cost(result: dict[str, Any]) -> str:
    """What the initialisation took, in this run's own epochs and training steps."""
    seconds = result["seconds"]["init"]
    share = seconds / epochs.seconds(result)
    steps = share * epochs.steps_per_epoch(result)
    return f"{seconds:.1f} s, as long as {share:.2f} epoch ({steps:.1f} training steps)"


def _place(checkpoint: Checkpoint, epochs: int) -> str:
    if checkpoint.step is None:
        return f"epoch {checkpoint.epoch} of {epochs}"
    return f"step {checkpoint.step}, in epoch {checkpoint.epoch + 1} of {epochs}"


def _prepare(harness: Harness, request: Request) -> Prepared:
    run = _begin(harness, request)
    run.session.say(f"device    {run.device}, {run.precision}")
    return harness.prepare(run)


def _begin(harness: Harness, request: Request) -> Run:
    """Settle device and precision; peak memory counts from here on."""
    device = harness.device(request.config.device)
    if device.type == "cuda":
        torch.cuda.init()  # of itself, only the first tensor does that
        torch.cuda.reset_peak_memory_stats(device)
    if request.processes.main:
        files.settle_precision(request.folder, request.config)
    request.processes.wait()
    precision = files.settle_precision(request.folder, request.config)
    return Run(**vars(request), device=device, precision=precision)


def _clear(harness: Harness, run: Run) -> None:
    """Remove whatever the run has left in its folder but the configuration."""
    if run.processes.main:
        common = (RESULT, FAILURE, ADAPTER, CURVES, INFORMATION_LOSS, *LOGS)
        files.remove(run.folder, (*common, *harness.kept.unfinished, *harness.leaves, *harness.extras))
    run.processes.wait()


def _initialise(harness: Harness, run: Prepared, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """Initialise the adapter, unless the checkpoint holds all of it. Returns the run's notes (`records.Notes`).

    Raises:
        ValueError: the run began with other content, or its initialisation comes out differently now.
    """
    notes = checkpoint.notes if checkpoint else {"origin": run.origin, "information_loss": None}
    check_origin(notes["origin"], run.origin, run.folder)
    diagnose = run.session.diagnose and notes["information_loss"] is None
    if checkpoint is None or diagnose or Properties.BEYOND_FACTORS in run.config.initializer.properties:
        found = initialise(run, _tune(harness, run), diagnose)
        if run.processes.main:
            check_same_initialisation(notes, found, run.folder)
        notes = {"seconds": dict(run.seconds), **notes, **{k: v for k, v in found.items() if v}}
    run.processes.share(run.model)
    run.seconds.update({k: v for k, v in notes["seconds"].items() if k in ("init", "reference")})
    return notes


def _tune(harness: Harness, asking: Prepared) -> Tune:
    """What makes the run that tunes a reference for another."""
    session = replace(asking.session, rerun=False, diagnose=False, reference_only=True, extras=(), log=None)
    return partial(run, harness, session=session)


def _write(harness: Harness, run: Request, result: dict[str, Any]) -> None:
    """Figures, then the last file of a run: with it the run is finished, and no longer needs its checkpoint."""
    if run.processes.main:
        save_figure(draw_training(result, harness.summary(result)), run.folder / CURVES)
        if result["information_loss"]:
            save_figure(draw_information_loss(result), run.folder / INFORMATION_LOSS)
        write_json(run.folder / RESULT, result)
        files.remove(run.folder, (FAILURE, *harness.kept.unfinished))


# -------------------------------------------------------------------------------------------- a run that is finished


def _check(harness: Harness, run: Request, result: dict[str, Any]) -> None:
    """Raise a ValueError if a result is not that of this run."""
    made_by, now = result.get("processes", 1), run.processes.count
    if made_by != now:
        raise ValueError(
            f"the run in {run.folder} was made by another number of processes ({made_by} then, {now} now), which "
            "decides the samples in a step: choose another --out, or --rerun"
        )
    files.check_same_run(result, run.config, run.folder)
    check_finished(result["origin"], harness.origin(run.config), run.folder)
    run.session.say(f"finished before; --rerun repeats it ({run.folder})")
    if run.processes.main:
        files.remove(run.folder, (FAILURE, *harness.kept.unfinished))


def _complete(harness: Harness, request: Request, result: dict[str, Any]) -> None:
    """Add what is asked for now and was not then."""
    if result.get("reference_only") and not request.session.reference_only:
        result = {**result, "reference_only": False}
        write_json(request.folder / RESULT, result)
    if request.session.diagnose and not result["information_loss"]:
        run = _prepare(harness, request)
        check_origin(result["origin"], run.origin, run.folder)
        found = initialise(run, _tune(harness, run), diagnose=True)
        _write(harness, run, {**result, "information_loss": found["information_loss"]})


def _add_extras(harness: Harness, request: Request) -> None:
    run = _begin(harness, request)
    for name in run.session.extras:
        if run.processes.main and not (run.folder / name).exists():
            harness.extras[name](run)
