"""A training loop whose steps are CUDA graphs, where there is a GPU: gradient accumulation, clipping, a schedule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from made_up import CLASSES, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from abm_vision import TrainingStep, add_lora, create_backbone, initialize_lora_abm_weights, save_adapter

ACCUMULATE = 2  # batches a step of the optimiser
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Everything that is captured: autocast, forward pass, loss."""
    pixels, labels = batch
    with torch.autocast(DEVICE, torch.bfloat16):
        return F.cross_entropy(model(pixels), labels) / ACCUMULATE


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the loss of the last batch."""
    loader = DataLoader(images(64, size), batch_size=8, shuffle=True, drop_last=True)  # one shape, one graph
    torch.manual_seed(0)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    model = add_lora(backbone.to(DEVICE), rank=8, alpha=8)
    initialize_lora_abm_weights(model, loader)

    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-3, fused=DEVICE == "cuda")
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(loader) // ACCUMULATE)
    step = TrainingStep(model.train(), loss_fn)  # on a CPU its steps are ordinary ones
    for k, (x, y) in enumerate(loader):
        loss = step((x.to(DEVICE), y.to(DEVICE)))  # gradients are in .grad, added to those that were there
        if (k + 1) % ACCUMULATE == 0:
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    save_adapter(model, out)
    return ACCUMULATE * loss.item()


if __name__ == "__main__":
    main()
