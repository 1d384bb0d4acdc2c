"""The algorithm: LoRA, its boundary matching and its measures. It imports torch and peft, no host library."""
