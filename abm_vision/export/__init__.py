"""A tuned model as one file for others: ONNX, `torch.export`, or a plain timm checkpoint."""
