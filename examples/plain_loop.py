"""A plain PyTorch loop: LoRA on a timm ViT, initialised by boundary matching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from made_up import CLASSES, images
from torch.utils.data import DataLoader

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, save_adapter


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the loss of the last step."""
    loader = DataLoader(images(64, size), batch_size=16, shuffle=True)
    torch.manual_seed(0)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    model = add_lora(backbone, rank=8, alpha=8)
    print(initialize_lora_abm_weights(model, loader).summary())  # before the optimiser is made

    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for x, y in loader:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    save_adapter(model, out)  # peft's files
    return loss.item()


if __name__ == "__main__":
    main()
