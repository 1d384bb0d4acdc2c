"""The training loop and the test: plain PyTorch, resumable after any epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abm_vision.abm import bars
from abm_vision.abm.step import TrainingStep
from abm_vision.images.data import Images, Preprocessing
from abm_vision.images.settings import ImageSettings
from abm_vision.runs.checkpoint import Progress
from abm_vision.runs.device import autocast
from abm_vision.runs.estimate import TimeLeft
from abm_vision.runs.folder import Diverged
from abm_vision.runs.harness import Session

SILENT = Session()  # nothing is said, shown or logged
AT_ONCE = 64 * 224 * 224  # pixels that are classified together: fewer bytes than training on a handful of images takes


def choose_attention(model: nn.Module, device: torch.device, precision: str) -> None:
    """Take timm's plain attention where torch's fused kernel is slow: its backward pass in bfloat16 on CPU.

    `benchmarks/attention.py` measures both.
    """
    if device.type == "cpu" and precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False


def learning_rate(config: ImageSettings, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then constant, or cosine to a hundredth of the peak."""
    total = config.epochs * steps_per_epoch
    warmup = config.warmup * total
    if step < warmup:
        return config.lr * (step + 1) / math.ceil(warmup)
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, total - warmup)
    return config.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def train_mode(model: nn.Module) -> None:
    """Training mode, but for batch norm: an adapter's file has no place for statistics that moved."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def make_optimiser(model: nn.Module, config: ImageSettings) -> torch.optim.AdamW:
    """AdamW on what trains: adapter and head."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    fused = trainable[0].is_cuda  # few launches, and none that waits
    return torch.optim.AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def train(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    images: Images,
    config: ImageSettings,
    precision: str,
    progress: Progress,
    after_epoch: Callable[[Progress], None],
    session: Session = SILENT,
) -> None:
    """Run the epochs that `progress` still lacks, and call `after_epoch` behind each; a log receives every step.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    device, log = images.device, session.log

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        with autocast(device, precision):
            return F.cross_entropy(model(pixels), labels)

    training_step = TrainingStep(model, loss_fn, config.step, say=lambda line: session.say(f"step      {line}"))
    steps = math.ceil(len(images) / config.batch_size)
    time_left = TimeLeft((config.epochs - progress.epoch) * steps, session.say)
    while progress.epoch < config.epochs:
        start, epoch = time.perf_counter(), progress.epoch
        train_mode(model)
        torch.manual_seed(config.seed * 100_003 + epoch)  # dropout and stochastic depth, the same after a resume
        batches = images.batches(config.batch_size, config.seed, epoch)
        bar = bars.progress(batches, f"epoch {epoch + 1:3d}/{config.epochs}", show=not session.quiet, total=steps)
        losses: list[Tensor] = []
        for step, batch in enumerate(bar):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(config, epoch * steps + step, steps)
            loss = training_step(batch)
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss)
            time_left.step(loss.item)
            if log:
                done = epoch * steps + step + 1
                log("train/loss", loss.item(), done)
                log("train/lr", group["lr"], done)
            if not bar.disable and step % 4 == 3:
                bar.set_postfix(loss=f"{torch.stack(losses[-4:]).mean().item():.3f}")
        values = torch.stack(losses).tolist()
        if not all(map(math.isfinite, values)):
            raise Diverged(f"the training loss is not finite in epoch {epoch + 1}: lower --lr (now {config.lr})")
        progress.losses += values
        progress.seconds.append(time.perf_counter() - start)
        progress.epoch += 1
        progress.step = "graph" if training_step.captured else "eager"
        began = time.perf_counter()
        after_epoch(progress)
        time_left.skip(time.perf_counter() - began)


@torch.no_grad()
def classify(
    model: nn.Module,
    chunks: Iterable[tuple[Tensor, Tensor]],
    preprocessing: Preprocessing,
    device: torch.device,
    precision: str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits (n, classes), labels (n,)), on CPU, of every chunk of uint8 images."""
    model.eval()
    for pixels, labels in chunks:
        parts = pixels.split(max(1, AT_ONCE // pixels[0, 0].numel()))
        with autocast(device, precision):
            logits = torch.cat([model(preprocessing.normalise(part.to(device))) for part in parts])
        yield logits.float().cpu(), labels
