"""transformers' Trainer with a timm model (`TimmWrapperForImageClassification`) and a Hugging Face dataset.

With a network, `TimmWrapperForImageClassification.from_pretrained("timm/...", num_labels=4)` downloads the model; here
it is assembled, so that weights on this machine are found too.
"""

from __future__ import annotations

import datasets
import numpy as np
import torch
from made_up import CLASSES
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification, Trainer, TrainingArguments

from abm_vision import add_lora, create_backbone, initialize_lora_abm_weights, save_adapter


def pictures(count: int, size: int) -> datasets.Dataset:
    """Return a dataset like those on the hub: columns `image` (decoded to PIL) and `label`."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)) for _ in range(count)]
    data = datasets.Dataset.from_dict({"image": noise, "label": rng.integers(0, CLASSES, count)})
    return data.cast_column("image", datasets.Image())


def main(name: str = "vit_small_patch14_dinov2", size: int = 70, weights: str = "auto", out: str = "adapter") -> float:
    """Train, and return the mean training loss."""
    torch.manual_seed(0)
    backbone, _ = create_backbone(name, num_classes=CLASSES, img_size=size, weights=weights)
    config = TimmWrapperConfig(architecture=name.partition(".")[0], num_labels=CLASSES, model_args={"img_size": size})
    wrapper = TimmWrapperForImageClassification(config)
    wrapper.timm_model = backbone

    to_tensor = v2.Compose([v2.ToImage(), v2.Resize([size, size]), v2.ToDtype(torch.float32, scale=True)])
    data = pictures(64, size).with_transform(
        lambda rows: {"pixel_values": [to_tensor(i) for i in rows["image"]], "labels": rows["label"]}
    )
    model = add_lora(wrapper, rank=8, alpha=8)
    initialize_lora_abm_weights(model, DataLoader(data, batch_size=16))

    arguments = TrainingArguments(
        output_dir=f"{out}-trainer",
        num_train_epochs=1,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        remove_unused_columns=False,  # the transform needs the column image
        label_names=["labels"],
        save_strategy="no",
        report_to="none",
    )
    loss = Trainer(model=model, args=arguments, train_dataset=data).train().training_loss
    save_adapter(model, out)
    return loss


if __name__ == "__main__":
    main()
