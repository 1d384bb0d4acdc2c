"""One run, from a configuration to a result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

try:
    import resource
except ImportError:  # Windows
    resource = None

import vtab_tasks
from abm_vision import plots
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.lora import add_lora
from abm_vision.initializers import get_initializer
from abm_vision.provenance import environment
from abm_vision.vtab import results
from abm_vision.vtab.config import SCHEMA, RunConfig, resolve_device
from abm_vision.vtab.data import Images, data_record, load_all, preprocessing_for, stream
from abm_vision.vtab.train import (
    Progress,
    autocast,
    choose_attention,
    count_correct,
    faster_with_bf16,
    make_optimiser,
    train,
)
from abm_vision.weights import create_backbone

TEST_SUBSET_SEED = 0  # a subset of the test split is the same for every run
Say = Callable[[str], None]


def run(
    config: RunConfig, out: str | Path = "results", *, rerun: bool = False, quiet: bool = True, say: Say | None = None
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
        say: receives a line about every stage.

    Returns:
        The content of `result.json`, with `folder` added.

    Raises:
        ValueError, OSError, WeightsNotFound: as the parts of the run do, each with one message.
    """
    say = say or (lambda line: None)
    folder = results.open_folder(out, config)
    if rerun:
        results.clear(folder)
    finished = results.read_result(folder)
    if finished is not None:
        say(f"finished before; --rerun repeats it ({folder})")
        return {**finished, "folder": str(folder)}
    result = _run(config, folder, quiet, say)
    plots.save_curves(result, folder / results.CURVES)
    results.write_result(folder, result)
    return {**results.read_result(folder), "folder": str(folder)}


def _run(config: RunConfig, folder: Path, quiet: bool, say: Say) -> dict[str, Any]:
    device = resolve_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    precision = results.settle_precision(folder, lambda: _precision(config, device))
    say(f"device    {device}, {precision}")
    seconds: dict[str, float] = {}
    stage = _stopwatch(seconds)

    with stage("data"):
        train_data = _load(config, "train800val200")
        test_data = _load(config, "test")
        if config.test_images:
            test_data = test_data.subset(config.test_images, TEST_SUBSET_SEED)
        say(f"data      {train_data.description}; {len(train_data)} training and {len(test_data)} test images")
    with stage("weights"):
        torch.manual_seed(config.seed)
        num_classes = train_data.task.num_classes
        backbone, weights = create_backbone(
            config.model, num_classes, config.image_size, config.weights, drop_path_rate=config.drop_path
        )
        preprocessing = preprocessing_for(backbone, config.image_size)
        say(f"weights   {weights}")
    with stage("data"):
        images = Images(*load_all(train_data, preprocessing), preprocessing, device)
    with stage("lora"):
        model = _adapted(backbone, config, images, device)

    state = results.load_checkpoint(folder, device)
    origin = {"train_data": data_record(train_data), "test_data": data_record(test_data), "weights": asdict(weights)}
    choose_attention(model, device, precision)
    if state is None:
        with stage("init"):
            report = _initialise(model, images, config, device, precision, quiet)
        progress, notes = Progress(), {"origin": origin, "abm": report, "seconds": dict(seconds)}
    else:
        progress, notes = state["progress"], state["notes"]
        _check_origin(notes["origin"], origin, folder)
        seconds.update(init=notes["seconds"]["init"])
        say(f"resumed   after epoch {progress.epoch} of {config.epochs}")
    if notes["abm"]:
        before, after = notes["abm"]["before"], notes["abm"]["after"]
        say(
            f"abm       loss {before['loss']:.5f} to {after['loss']:.5f}, match rate {before['match']:.4f} to "
            f"{after['match']:.4f}, {seconds['init']:.1f} s"
        )
    optimiser = make_optimiser(model, config)
    if state is not None:
        results.restore(model, optimiser, state)

    def test() -> tuple[int, int]:
        chunks = stream(test_data, preprocessing, config.workers)
        return count_correct(model, chunks, preprocessing, device, precision, quiet)

    def after_epoch(progress: Progress) -> None:
        if config.eval_epochs and progress.epoch % config.eval_epochs == 0 and progress.epoch < config.epochs:
            correct, count = test()
            progress.accuracies[progress.epoch] = correct / count
        results.save_checkpoint(folder, model, optimiser, progress, notes)
        epoch_loss = sum(progress.losses[-_steps(images, config) :]) / _steps(images, config)
        say(f"epoch {progress.epoch:3d} loss {epoch_loss:.3f}, {progress.seconds[-1]:.1f} s")

    train(model, optimiser, images, config, precision, progress, after_epoch, quiet)
    seconds["train"] = sum(progress.seconds)
    with stage("test"):
        correct, count = test()
    if config.eval_epochs:
        progress.accuracies[config.epochs] = correct / count
    result = {
        "schema": SCHEMA,
        "config": asdict(config),
        "test": {
            "top1": correct / count,
            "correct": correct,
            "count": count,
            "split_size": train_data.task.size("test"),
        },
        "data": {"train": data_record(train_data), "test": data_record(test_data)},
        "num_classes": num_classes,
        "weights": asdict(weights),
        "preprocessing": asdict(preprocessing),
        "precision": precision,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "abm": notes["abm"],
        "loss_per_step": progress.losses,
        "seconds_per_epoch": progress.seconds,
        "top1_per_epoch": {str(epoch): value for epoch, value in progress.accuracies.items()},
        "seconds": seconds,
        "images_per_second": {"train": len(images) * config.epochs / seconds["train"], "test": count / seconds["test"]},
        "peak_memory_mib": _peak_memory(device),
        "environment": environment(str(device)),
    }
    results.write_adapter(folder, model, results.model_card(result), **_predict_settings(result))
    return result


def _load(config: RunConfig, split: str) -> vtab_tasks.TaskData:
    return vtab_tasks.load(config.task, split, source=config.source, data_dir=config.data_dir)


def _adapted(backbone: torch.nn.Module, config: RunConfig, images: Images, device: torch.device) -> PeftModel:
    torch.manual_seed(config.seed)
    model = add_lora(
        backbone,
        config.rank,
        config.alpha,
        targets=config.lora_targets(),
        qkv=config.qkv,
        dropout=config.dropout,
    ).to(device)
    pixels, _ = next(images.batches(2, config.seed, 0))
    check_adapters(model.eval(), pixels)
    return model


def _initialise(
    model: PeftModel, images: Images, config: RunConfig, device: torch.device, precision: str, quiet: bool
) -> dict[str, Any] | None:
    start = get_initializer(config.init)
    batches = images.batches(min(config.batch_size, config.abm_samples), config.seed, 0)
    with autocast(device, precision):
        report = start.apply(model, batches, config.abm(), not quiet and sys.stderr.isatty())
    return report.to_dict() if report else None


def _check_origin(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """A run must not go on with other data or weights than it began with: `auto` may find others meanwhile."""
    for name, value in now.items():
        if before[name] != value:
            raise ValueError(
                f"the run in {folder} began with {name} {before[name]}, now it is {value}; --rerun starts afresh"
            )


def _precision(config: RunConfig, device: torch.device) -> str:
    if config.precision == "auto":
        return "bf16" if faster_with_bf16(device) else "fp32"
    return config.precision


def _steps(images: Images, config: RunConfig) -> int:
    return -(-len(images) // config.batch_size)


def _peak_memory(device: torch.device) -> float | None:
    """MiB: on CUDA what torch has allocated on the device for this run, elsewhere the process's resident peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


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


def _stopwatch(seconds: dict[str, float]) -> Callable[[str], Any]:
    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    return stage
