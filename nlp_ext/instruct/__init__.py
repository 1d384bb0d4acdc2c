"""The LLaMA setting of the paper: instruction tuning."""
