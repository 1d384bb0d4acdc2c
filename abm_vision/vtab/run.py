"""One run, from a configuration to a result."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
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
from abm_vision.abm.adapters import ABM_FILE, load_reference, read_settings
from abm_vision.abm.backbone import find_backbone
from abm_vision.abm.checks import check_adapters
from abm_vision.abm.gradient import adapted_layers
from abm_vision.abm.lora import add_lora
from abm_vision.abm.tangent import InformationLoss, information_loss
from abm_vision.initializers import get_initializer, initialize_lora
from abm_vision.provenance import environment
from abm_vision.vtab import results
from abm_vision.vtab.config import SCHEMA, RunConfig, resolve_device
from abm_vision.vtab.data import Images, Preprocessing, data_record, load_all, preprocessing_for, shuffled, stream
from abm_vision.vtab.train import (
    Progress,
    autocast,
    choose_attention,
    count_correct,
    faster_with_bf16,
    make_optimiser,
    train,
)
from abm_vision.weights import WeightSource, create_backbone

TEST_SUBSET_SEED = 0  # a subset of the test split is the same for every run
DIAGNOSIS_IMAGES, DIAGNOSIS_BATCH = 64, 8  # a batch's activations and one gradient a layer must fit into memory
REFERENCE = "reference"
Say = Callable[[str], None]


def run(
    config: RunConfig,
    out: str | Path = "results",
    *,
    rerun: bool = False,
    quiet: bool = True,
    diagnose: bool = False,
    say: Say | None = None,
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
    result = results.read_result(folder)
    if result is not None:
        say(f"finished before; --rerun repeats it ({folder})")
        if not diagnose or result["information_loss"]:
            return {**result, "folder": str(folder)}
        setup = _prepare(config, folder, say)
        origin = {"train_data": result["data"]["train"], "test_data": result["data"]["test"]}
        _check_origin({**origin, "weights": result["weights"]}, setup.origin, folder)
        result["information_loss"] = _start(setup, config, out, {}, quiet, diagnose, say)["information_loss"]
    else:
        setup = _prepare(config, folder, say)
        result = _run(setup, config, folder, out, quiet, diagnose, say)
        plots.save_figure(plots.draw_curves(result), folder / results.CURVES)
    if result["information_loss"]:
        plots.save_figure(plots.draw_information_loss(result), folder / results.INFORMATION_LOSS)
    results.write_result(folder, result)
    return {**results.read_result(folder), "folder": str(folder)}


@dataclass
class _Setup:
    """A run before its start: the adapted model, the data, and what is to be recorded of them."""

    model: PeftModel
    images: Images
    train_data: vtab_tasks.TaskData
    test_data: vtab_tasks.TaskData
    preprocessing: Preprocessing
    weights: WeightSource
    device: torch.device
    precision: str
    seconds: dict[str, float]

    @property
    def origin(self) -> dict[str, Any]:
        """What a run that is taken up again must find unchanged."""
        data = {"train_data": data_record(self.train_data), "test_data": data_record(self.test_data)}
        return {**data, "weights": asdict(self.weights)}


def _prepare(config: RunConfig, folder: Path, say: Say) -> _Setup:
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
    choose_attention(model, device, precision)
    return _Setup(model, images, train_data, test_data, preprocessing, weights, device, precision, seconds)


def _start(
    setup: _Setup, config: RunConfig, out: str | Path, seconds: dict[str, float], quiet: bool, diagnose: bool, say: Say
) -> dict[str, Any]:
    """Apply the start. Returns its report, its reference and, if asked for, the information loss around it."""
    targets = list(adapted_layers(setup.model, "default"))
    before = _information_loss(setup, config, targets) if diagnose else None
    with _reference(setup.model, setup.weights, config, out, quiet, say) as reference:
        if reference and reference["seconds"] is not None:
            seconds["reference"] = reference["seconds"]
        with _stopwatch(seconds)("init"), autocast(setup.device, setup.precision):
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


def _information_loss(setup: _Setup, config: RunConfig, targets: Sequence[str], seen: bool = False) -> InformationLoss:
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
    model: PeftModel, weights: WeightSource, config: RunConfig, out: str | Path, quiet: bool, say: Say
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
        given = run(_without_own_settings(config), out, quiet=quiet, say=say)["folder"]
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
    unused = {f.name: f.default for f in fields(RunConfig) if f.name.startswith(("abm_", "align_"))}
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


def _run(
    setup: _Setup, config: RunConfig, folder: Path, out: str | Path, quiet: bool, diagnose: bool, say: Say
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
        _check_origin(notes["origin"], setup.origin, folder)
    diagnose = diagnose and notes["information_loss"] is None
    if state is None or diagnose or not get_initializer(config.init).in_factors:
        started = _start(setup, config, out, seconds, quiet, diagnose, say)
        if notes.get("start", started["start"]) != started["start"]:
            raise ValueError(
                f"the start of the run in {folder} comes out differently now (other threads, device or versions?), so "
                "its checkpoint does not fit; --rerun starts afresh"
            )
        notes = {"origin": setup.origin, "seconds": dict(seconds), **notes, **{k: v for k, v in started.items() if v}}
    if state is not None:
        seconds.update({k: v for k, v in notes["seconds"].items() if k in ("init", "reference")})
        say(f"resumed   after epoch {progress.epoch} of {config.epochs}")
    optimiser = make_optimiser(model, config)
    if state is not None:
        results.restore(model, optimiser, state)
    stage = _stopwatch(seconds)

    def test() -> tuple[int, int]:
        chunks = stream(setup.test_data, setup.preprocessing, config.workers)
        return count_correct(model, chunks, setup.preprocessing, device, precision, quiet)

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
            "split_size": setup.train_data.task.size("test"),
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
