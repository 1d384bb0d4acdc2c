"""Several processes (DDP), on CPU or GPUs: torchrun --nproc-per-node 2 examples/ddp.py

The first process initialises the adapter; DDP broadcasts its weights to the others when it wraps the model.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from made_up import CLASSES, images
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, save_adapter


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the loss of this process's last step."""
    dist.init_process_group()
    first = dist.get_rank() == 0
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    data = images(64, size)
    torch.manual_seed(0)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    model = add_lora(backbone.to(device), rank=8, alpha=8)
    if first:
        initialize_lora_abm_weights(model, DataLoader(data, batch_size=16, shuffle=True))

    parallel = DistributedDataParallel(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    parallel.train()
    for x, y in DataLoader(data, batch_size=8, sampler=DistributedSampler(data)):
        loss = F.cross_entropy(parallel(x.to(device)), y.to(device))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    if first:
        save_adapter(model, out)
    dist.destroy_process_group()
    return loss.item()


if __name__ == "__main__":
    main()
