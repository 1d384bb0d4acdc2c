"""Tune on a folder of images, one sub-folder per class, and classify one image with the saved adapter.

python examples/own_images.py my/folder        # with train/<class>/*.jpg and test/<class>/*.jpg in it
"""

from __future__ import annotations

import argparse
import random

import timm.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, load_adapter, save_adapter


def main(
    folder: str,
    name: str = "vit_small_patch14_dinov2",
    size: int = 70,  # pixels, a multiple of the patch: 70 is quick on a CPU, 224 is usual on a GPU
    weights: str = "auto",
    out: str = "adapter",
    epochs: int = 10,
) -> float:
    """Train, and return top-1 on the test images, in [0, 1]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    classes = ImageFolder(f"{folder}/train").classes
    torch.manual_seed(0)
    random.seed(0)  # for timm's augmentation
    backbone, _ = create_backbone(name, num_classes=len(classes), img_size=size, weights=weights)
    recorded = timm.data.resolve_model_data_config(backbone) | {"input_size": (3, size, size), "crop_pct": 1.0}
    augmented = timm.data.create_transform(**recorded, is_training=True, scale=(0.6, 1.0))
    plain = timm.data.create_transform(**recorded)
    train = DataLoader(ImageFolder(f"{folder}/train", augmented), batch_size=32, shuffle=True)
    test = DataLoader(ImageFolder(f"{folder}/test", plain), batch_size=64)

    model = add_lora(backbone, rank=8, alpha=8).to(device)
    print(initialize_lora_abm_weights(model, train).summary())  # before the optimiser is made
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(epochs):
        model.train()
        for images, labels in train:
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
        top1 = accuracy(model, test, device)
        print(f"epoch {epoch + 1}: last loss {loss.item():.3f}, top-1 {100 * top1:.1f} % of {len(test.dataset)}")
    save_adapter(model, out, classes=classes)  # a few MB: LoRA and the head

    # Elsewhere, later: the same timm model, the adapter, one image.
    backbone, _ = create_backbone(name, num_classes=len(classes), img_size=size, weights=weights)
    model = load_adapter(backbone, out).eval()
    path, _ = test.dataset.samples[0]
    with torch.no_grad(), Image.open(path) as image:
        chances = model(plain(image.convert("RGB"))[None]).softmax(-1)[0]
    print(f"{path}: {classes[int(chances.argmax())]}, {100 * chances.max().item():.0f} %")
    return top1


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: DataLoader, device: str) -> float:
    """Compute top-1 over the loader, in [0, 1]."""
    model.eval()
    right = sum((model(images.to(device)).argmax(-1).cpu() == labels).sum().item() for images, labels in loader)
    return right / len(loader.dataset)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    main(parser.parse_args().folder)
