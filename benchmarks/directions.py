"""Directions that A can be initialised with: trials behind the aligned initialisation.

    python benchmarks/directions.py --task dsprites_loc      # resumes after an interruption

Rendered data, DINOv2 ViT-S/14 at 70 px, one seed: the first 5 of 12 epochs. Every variant sets A (r,
in) and perhaps B (out, r) of every adapted layer from the layer's gradient G = U S V^T and its inputs x on 128 labelled
images. Rows of A are orthonormal unless said otherwise. Every trial is one line of
`results/directions-TASK.jsonl`.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from initializers import WHOLE
from ledger import Ledger, parse
from peft import PeftModel
from torch import Tensor

import vtab_tasks
from abm_vision import VIT, add_lora, create_backbone, information_loss, initialize_lora_abm_weights
from abm_vision.abm.adapter import adapted_layers
from abm_vision.abm.gradient import weight_gradients
from abm_vision.images.data import Images, load_all, preprocessing_for
from abm_vision.images.train import Progress, choose_attention, make_optimiser, train
from abm_vision.runs.device import autocast, has_fast_bf16
from abm_vision.runs.provenance import environment
from abm_vision.vtab import make_config

IMAGES, EPOCHS, RANK = 128, 5, 8


@dataclass(frozen=True)
class Given:
    """One layer's G (out, in), inputs x (tokens, in), and A (r, in) as peft initialises it."""

    gradient: Tensor
    inputs: Tensor
    drawn: Tensor

    @property
    def rank(self) -> int:
        return len(self.drawn)

    def right(self, first: int, count: int = 0) -> Tensor:
        """Return right singular vectors of G as rows, from number `first` (1 leads); as many as the rank by default."""
        return torch.linalg.svd(self.gradient, full_matrices=False)[2][first - 1 :][: count or self.rank]

    def left(self) -> Tensor:
        """Return the leading left singular vectors as columns."""
        return torch.linalg.svd(self.gradient, full_matrices=False)[0][:, :RANK]

    def principal(self, first: int, count: int = RANK) -> Tensor:
        """Return principal directions of the inputs, not centred, as in EVA."""
        return torch.linalg.svd(self.inputs, full_matrices=False)[2][first - 1 : first - 1 + count]


def mixed(given: Given) -> Tensor:
    """Draw eight random orthonormal combinations of v_1 .. v_16."""
    rotation, _ = torch.linalg.qr(torch.randn(2 * RANK, 2 * RANK, generator=torch.Generator().manual_seed(0)))
    return rotation[:RANK] @ given.right(1, 2 * RANK)


def evened(given: Given) -> Tensor:
    """Divide each of v_1 .. v_8 by the root mean square of its v x, then scale the rows to a mean length of 1."""
    rows = given.right(1)
    rows = rows / (given.inputs @ rows.T).square().mean(0).sqrt()[:, None]
    return rows / rows.norm() * RANK**0.5


Factors = Callable[[Given], tuple[Tensor, Tensor | None]]  # A, and B unless it is zero


@dataclass(frozen=True)
class Variant:
    """One way to initialise.

    Args:
        factors: a layer's A and B.
        heads: random heads whose gradients are stacked to (heads * out, in).
        labelled: if not, the labels are permuted.
        shared: ranks by the gradients' spectra (`shared_ranks`), their sum unchanged.
        matched: match boundaries to the pretrained model's afterwards.
    """

    factors: Factors
    heads: int = 1
    labelled: bool = True
    shared: bool = False
    matched: bool = False


VARIANTS: dict[str, Variant] = {
    "peft's default": Variant(lambda g: (g.drawn, None)),
    "default, rows 1.73 as long (1.0)": Variant(lambda g: (3**0.5 * g.drawn, None)),
    "default, rows 3 as long": Variant(lambda g: (3 * g.drawn, None)),
    "v1 .. v8": Variant(lambda g: (g.right(1), None)),
    "v9 .. v16": Variant(lambda g: (g.right(g.rank + 1), None)),
    "v9 .. v16, rows 0.58 long": Variant(lambda g: (g.right(9) / 3**0.5, None)),
    "v17 .. v24": Variant(lambda g: (g.right(17), None)),
    "mix of v1 .. v16": Variant(lambda g: (mixed(g), None)),
    "v1 .. v8, evened by the inputs": Variant(lambda g: (evened(g), None)),
    "inputs' 1 .. 8 (EVA)": Variant(lambda g: (g.principal(1), None)),
    "inputs' 9 .. 16": Variant(lambda g: (g.principal(9), None)),
    "v9 .. v16, B 0.05 u1 .. u8": Variant(lambda g: (g.right(9), 0.05 * g.left())),
    "v9 .. v16, B 0.2 u1 .. u8": Variant(lambda g: (g.right(9), 0.2 * g.left())),
    "v9 .. v16 of 4 heads": Variant(lambda g: (g.right(9), None), heads=4),
    "v9 .. v16, random labels": Variant(lambda g: (g.right(9), None), labelled=False),
    "v9 .. v16, ranks shared": Variant(lambda g: (g.right(g.rank + 1), None), shared=True),
    "v9 .. v16, then matched": Variant(lambda g: (g.right(9), None), matched=True),
    "default, then matched (ABM)": Variant(lambda g: (g.drawn, None), matched=True),
}
LR = 1e-3  # fixed: the length of A's rows, which acts like a rate, is varied instead


class _Enough(Exception):
    """Ends a training after its first epochs."""


def adapted(task: str, ranks: dict[str, int], seed: int = 0) -> tuple[PeftModel, Images, torch.device, str]:
    """Build the model, of rank 8 except in the layers of `ranks`, at scale 1; return images, device, precision, too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = "bf16" if has_fast_bf16(device) else "fp32"
    data = vtab_tasks.load(task, "train800val200", source="rendered")
    torch.manual_seed(seed)
    backbone, _ = create_backbone("vit_small_patch14_dinov2.lvd142m", data.task.num_classes, 70)
    preprocessing = preprocessing_for(backbone, 70)
    torch.manual_seed(seed)
    model = add_lora(backbone, RANK, RANK, rank_pattern=ranks, alpha_pattern=ranks).to(device)
    choose_attention(model, device, precision)
    return model, Images(*load_all(data, preprocessing), preprocessing, device), device, precision


def gradients(model: PeftModel, batch: tuple[Tensor, Tensor], variant: Variant) -> dict[str, Tensor]:
    """Compute every layer's G (out, in), or (heads * out, in) with several heads."""
    images, labels = batch
    if not variant.labelled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    head = model.get_base_model().get_classifier()
    drawn = copy.deepcopy(head.state_dict())
    found: dict[str, list[Tensor]] = {}
    for seed in range(variant.heads):
        if seed:
            torch.manual_seed(seed)
            head.modules_to_save["default"].reset_parameters()
        weight_gradients(model, [(images, labels)], VIT.loss_fn, lambda n, g: found.setdefault(n, []).append(g))
    head.load_state_dict(drawn)
    return {name: torch.cat(parts) for name, parts in found.items()}


def shared_ranks(found: dict[str, Tensor]) -> dict[str, int]:
    """Distribute ranks, 8 a layer on average, to the largest shares s_i^2 / sum s^2 of all spectra; at least 1 each."""
    shares = {name: torch.linalg.svdvals(g).square() for name, g in found.items()}
    everything = torch.cat([s[1:] / s.sum() for s in shares.values()])
    least = everything.topk((RANK - 1) * len(found)).values[-1]
    return {name: 1 + int((s[1:] / s.sum() >= least).sum()) for name, s in shares.items()}


def initialise(model: PeftModel, images: Images, device: torch.device, precision: str, variant: Variant) -> None:
    layers = adapted_layers(model, "default")
    batch = next(images.batches(IMAGES, 0, 0))
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack, autocast(device, precision):
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.__setitem__(name, args[0].detach().float().flatten(0, -2))
            )
            stack.callback(handle.remove)
        found = gradients(model, batch, variant)
    with torch.no_grad():
        for name, layer in layers.items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            new_a, new_b = variant.factors(Given(found[name], inputs[name], a.clone()))
            a.copy_(new_a)
            if new_b is not None:
                b.copy_(new_b)
    if variant.matched:
        with autocast(device, precision):
            initialize_lora_abm_weights(model, images.batches(64, 0, 0), show_progress_bar=False)


def trial(task: str, name: str) -> dict[str, Any]:
    variant = VARIANTS[name]
    model, images, device, precision = adapted(task, {})
    if variant.shared:
        with autocast(device, precision):
            ranks = shared_ranks(gradients(model, next(images.batches(IMAGES, 0, 0)), variant))
        model, *_ = adapted(task, ranks)
    initialise(model, images, device, precision, variant)
    order = torch.arange(len(images))  # the last images of the unshuffled set, of which most were not used
    with autocast(device, precision):
        lost = information_loss(model, [images.select(order[-64:])], VIT.loss_fn).overall.loss
    config = make_config(task=task, lr=LR, **WHOLE)
    progress = Progress()

    def stop(progress: Progress) -> None:
        if progress.epoch == EPOCHS:
            raise _Enough

    try:
        train(model, make_optimiser(model, config), images, config, precision, progress, stop)
    except _Enough:
        pass
    steps = len(progress.losses) // EPOCHS
    epochs = [statistics.mean(progress.losses[k * steps : (k + 1) * steps]) for k in range(EPOCHS)]
    return {
        "variant": name,
        "lr": LR,
        "area": round(statistics.mean(progress.losses), 4),
        "loss_per_epoch": [round(value, 4) for value in epochs],
        "information_loss": round(lost, 4),
        "precision": precision,
        "environment": environment(str(device)),
    }


def main() -> None:
    options = parse(__doc__)
    ledger = Ledger(f"directions-{options.task}")
    done = {r["variant"] for r in ledger.records}
    for name in VARIANTS:
        if name in done:
            continue
        record = trial(options.task, name)
        ledger.append(record)
        print(f"{name}: {record['area']:.3f} {record['loss_per_epoch']}", flush=True)


if __name__ == "__main__":
    main()
