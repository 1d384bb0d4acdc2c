"""timm's own training tools: optimiser and scheduler factories, mixup, an average of the weights (EMA)."""

from __future__ import annotations

import torch
from made_up import CLASSES, images
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, save_adapter


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the loss of the last step."""
    loader = DataLoader(images(64, size), batch_size=16, shuffle=True, drop_last=True)
    torch.manual_seed(0)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    model = add_lora(backbone, rank=8, alpha=8)
    initialize_lora_abm_weights(model, loader)

    optimiser = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=1e-4)  # selects the trainable parameters
    scheduler, epochs = create_scheduler_v2(optimiser, "cosine", num_epochs=2, warmup_epochs=1, warmup_lr=1e-5)
    average = ModelEmaV3(model, decay=0.9)
    mixup, criterion = Mixup(0.2, 1.0, num_classes=CLASSES), SoftTargetCrossEntropy()
    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            mixed, targets = mixup(x, y)
            loss = criterion(model(mixed), targets)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            average.update(model)
        scheduler.step(epoch + 1)
    save_adapter(average.module, out)
    return loss.item()


if __name__ == "__main__":
    main()
