"""Lightning: initialise before `Trainer.fit`, which makes the optimiser. Needs `pip install lightning`."""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from made_up import CLASSES, images
from torch import Tensor, nn
from torch.utils.data import DataLoader

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, save_adapter


class Tuned(lightning.LightningModule):
    """Any adapted classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the loss of the last step."""
    loader = DataLoader(images(64, size), batch_size=16, shuffle=True)
    lightning.seed_everything(0, verbose=False)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    model = add_lora(backbone, rank=8, alpha=8)
    initialize_lora_abm_weights(model, loader)

    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer.fit(Tuned(model), loader)
    save_adapter(model, out)
    return trainer.callback_metrics["train/loss"].item()


if __name__ == "__main__":
    main()
