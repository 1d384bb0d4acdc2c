"""One run, from a configuration to a result."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from abm_vision import plots
from abm_vision.initializers import Properties
from abm_vision.runs import folder as files
from abm_vision.runs.content import check_finished, check_origin
from abm_vision.runs.device import peak_memory
from abm_vision.runs.log import Log
from abm_vision.runs.provenance import environment
from abm_vision.runs.start import Say, Tune, check_same_start, start_adapter, stopwatch
from abm_vision.vtab import results
from abm_vision.vtab.config import SCHEMA, RunConfig
from abm_vision.vtab.data import Images, data_record, stream
from abm_vision.vtab.setup import Setup, origin_parts, prepare
from abm_vision.vtab.train import Progress, count_correct, make_optimiser, train


def run(
    config: RunConfig,
    out: str | Path = "results",
    *,
    rerun: bool = False,
    quiet: bool = True,
    diagnose: bool = False,
    reference_only: bool = False,
    say: Say | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Adapt a pretrained ViT to one task, test it once, and write everything under `out`.

    A finished run is read, not repeated; a killed one goes on from its last whole epoch with the same result, bit
    for bit on CPU. The test split is opened after the last epoch (earlier only with `eval_epochs`, which decides
    nothing).

    Args:
        config: the settings.
        out: parent of the run's folder, which `config.run_name()` names.
        rerun: start afresh even if the run is finished or half done.
        quiet: no progress bars.
        diagnose: measure the adapter's information loss before and after its start, on training images that the
            start does not see, and after it on some that it does; a finished run that lacks it gets it added.
        reference_only: the run is made for the sake of another that matches boundaries to it; a report leaves it out,
            until the same run is asked for in its own right.
        say: receives a line about every stage.
        log: receives every step's loss and learning rate, and top-1 where it is followed (see `runs.log`).

    Returns:
        The content of `result.json`, with `folder` added.

    Raises:
        Busy: another process is at this run.
        ValueError, OSError, WeightsNotFound: as the parts of the run do, each with one message.
    """
    say = say or (lambda line: None)
    tune = partial(run, out=out, quiet=quiet, reference_only=True, say=say)
    folder = files.open_folder(out, config)
    with files.locked(folder):
        result = None if rerun else results.read_result(folder)
        if result is not None:
            say(f"finished before; --rerun repeats it ({folder})")
            files.remove(folder, results.LEFT)
            files.check_same_run(result, config, folder)
            check_finished(result["origin"], origin_parts(config), folder)
            wanted_now = result["reference_only"] and not reference_only
            if wanted_now:
                result["reference_only"] = False
                results.write_result(folder, result)
            if not diagnose or result["information_loss"]:
                return {**result, "folder": str(folder)}
            setup = prepare(config, folder, say)
            check_origin(result["origin"], setup.origin, folder)
            started = start_adapter(setup, config, tune, {}, quiet, diagnose, say)
            result["information_loss"] = started["information_loss"]
        else:
            setup = prepare(config, folder, say)
            if rerun or not (folder / results.CHECKPOINT).is_file():
                results.clear(folder)  # only now: what is there is lost for a run that can begin
            result = _run(setup, config, folder, tune, quiet, diagnose, say, log)
            plots.save_figure(plots.draw_curves(result), folder / results.CURVES)
        if result["information_loss"]:
            plots.save_figure(plots.draw_information_loss(result), folder / results.INFORMATION_LOSS)
        results.write_result(folder, {**result, "reference_only": result.get("reference_only", reference_only)})
        return {**results.read_result(folder), "folder": str(folder)}


def _run(
    setup: Setup,
    config: RunConfig,
    folder: Path,
    tune: Tune,
    quiet: bool,
    diagnose: bool,
    say: Say,
    log: Log | None,
) -> dict[str, Any]:
    model, images, device, precision, seconds = (
        setup.model,
        setup.images,
        setup.device,
        setup.precision,
        setup.seconds,
    )
    state = results.load_checkpoint(folder, device)
    progress = Progress() if state is None else state["progress"]
    notes = {"information_loss": None} if state is None else state["notes"]
    if state is not None:
        check_origin(notes["origin"], setup.origin, folder)
    diagnose = diagnose and notes["information_loss"] is None
    if state is None or diagnose or Properties.BEYOND_FACTORS in config.initializer.properties:
        started = start_adapter(setup, config, tune, seconds, quiet, diagnose, say)
        check_same_start(notes, started, folder)
        notes = {"origin": setup.origin, "seconds": dict(seconds), **notes, **{k: v for k, v in started.items() if v}}
    if state is not None:
        seconds.update({k: v for k, v in notes["seconds"].items() if k in ("init", "reference")})
        say(f"resumed   after epoch {progress.epoch} of {config.epochs}")
    optimiser = make_optimiser(model, config)
    if state is not None:
        results.restore(model, optimiser, state, folder)
    stage = stopwatch(seconds)

    def test() -> tuple[int, int]:
        chunks = stream(setup.test_data, setup.preprocessing, config.workers)
        return count_correct(model, chunks, setup.preprocessing, device, precision, quiet)

    def after_epoch(progress: Progress) -> None:
        if config.eval_epochs and progress.epoch % config.eval_epochs == 0 and progress.epoch < config.epochs:
            correct, count = test()
            progress.accuracies[progress.epoch] = correct / count
            if log:
                log("test/top1", correct / count, len(progress.losses))
        results.save_checkpoint(folder, model, optimiser, progress, notes)
        epoch_loss = sum(progress.losses[-_steps(images, config) :]) / _steps(images, config)
        say(f"epoch {progress.epoch:3d} loss {epoch_loss:.3f}, {progress.seconds[-1]:.1f} s")

    train(model, optimiser, images, config, precision, progress, after_epoch, quiet, log)
    seconds["train"] = sum(progress.seconds)
    with stage("test"):
        correct, count = test()
    if log:
        log("test/top1", correct / count, len(progress.losses))
    if config.eval_epochs:
        progress.accuracies[config.epochs] = correct / count
    result = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "origin": setup.origin,
        "test": {
            "top1": correct / count,
            "correct": correct,
            "count": count,
            "split": setup.test_data.split,
            "split_size": setup.split_size,
        },
        "data": {"train": data_record(setup.train_data), "test": data_record(setup.test_data)},
        "num_classes": setup.train_data.task.num_classes,
        "weights": asdict(setup.weights),
        "preprocessing": asdict(setup.preprocessing),
        "precision": precision,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "abm": notes.get("report"),
        "reference": notes.get("reference"),
        "information_loss": notes["information_loss"],
        "loss_per_step": progress.losses,
        "seconds_per_epoch": progress.seconds,
        "top1_per_epoch": {str(epoch): value for epoch, value in progress.accuracies.items()},
        "seconds": seconds,
        "images_per_second": {"train": len(images) * config.epochs / seconds["train"], "test": count / seconds["test"]},
        "peak_memory_mib": peak_memory(device),
        "environment": environment(str(device)),
    }
    files.write_adapter(folder, model, results.model_card(result), **_predict_settings(result))
    return result


def _steps(images: Images, config: RunConfig) -> int:
    return -(-len(images) // config.batch_size)


def _predict_settings(result: dict[str, Any]) -> dict[str, Any]:
    """What `predict` needs beside the adapter's own files."""
    keep = ("task", "model", "weights", "init", "seed")
    return {
        "run": {k: result["config"][k] for k in keep},
        "num_classes": result["num_classes"],
        "weights": result["weights"],
        "preprocessing": result["preprocessing"],
        "test": result["test"],
        "data_source": result["data"]["train"]["source"],
        "report": result["abm"],
    }
