"""Accuracy of a linear probe on the frozen model on the rendered tasks, which should need more than that.

    python benchmarks/linear_probe.py

DINOv2 ViT-S/14 at 70 px, the classifier's input features, standardised. Multinomial logistic regression in float64; its
L2 penalty is the one of `PENALTIES` with the best top-1 on the 800/200 split, then it is fitted on all 1,000 images.
Top-1 on 5,000 test images, those that seed 0 of the quick preset draws. Results of tuning are in `results/suite`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import vtab_tasks
from abm_vision import create_backbone
from abm_vision.abm.files import write_json
from abm_vision.images.data import Stream, preprocessing_for
from abm_vision.images.train import choose_attention
from abm_vision.runs.device import autocast, has_fast_bf16
from abm_vision.runs.provenance import environment

RESULT = Path(__file__).parent / "results" / "linear_probe.json"
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
TEST_IMAGES = 5000


@torch.no_grad()
def features(model: torch.nn.Module, data: vtab_tasks.TaskData, device: torch.device) -> tuple[Tensor, Tensor]:
    """Compute the classifier's inputs, float64 (n, dim), and return them with the labels (n,)."""
    precision = "bf16" if has_fast_bf16(device) else "fp32"
    choose_attention(model, device, precision)
    preprocessing, found, labels = preprocessing_for(model, 70), [], []
    for pixels, of_these in Stream(data, preprocessing):
        with autocast(device, precision):
            tokens = model.forward_features(preprocessing.normalise(pixels.to(device)))
            found.append(model.forward_head(tokens, pre_logits=True).double().cpu())
        labels.append(of_these)
    return torch.cat(found), torch.cat(labels)


def fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    """Fit weight (classes, dim) and bias of a logistic regression with mean loss + penalty / 2 * |weight|^2."""
    weight = torch.zeros(classes, x.shape[1], dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimiser.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach(), bias.detach()


def top1(x: Tensor, y: Tensor, fitted: tuple[Tensor, Tensor]) -> float:
    weight, bias = fitted
    return ((x @ weight.T + bias).argmax(1) == y).double().mean().item()


def probe(task: str, device: torch.device) -> dict[str, object]:
    train = vtab_tasks.load(task, "train800val200", source="rendered")
    test = vtab_tasks.load(task, "test", source="rendered")
    test = test.subset(min(TEST_IMAGES, len(test)), 0)
    classes = train.task.num_classes
    torch.manual_seed(0)
    model = create_backbone("vit_small_patch14_dinov2.lvd142m", classes, 70)[0].eval().to(device)
    (x, y), (x_test, y_test) = features(model, train, device), features(model, test, device)
    mean, std = x.mean(0), x.std(0)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    scores = {p: top1(x[800:], y[800:], fit(x[:800], y[:800], classes, p)) for p in PENALTIES}
    penalty = max(scores, key=lambda p: scores[p])
    accuracy = top1(x_test, y_test, fit(x, y, classes, penalty))
    return {"task": task, "penalty": penalty, "val200": scores[penalty], "top1": accuracy, "images": len(y_test)}


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for task in (t for t in vtab_tasks.TASKS.values() if t.group == "structured"):
        rows.append(probe(task.name, device))
        print(rows[-1], flush=True)
    content = {"command": "python benchmarks/linear_probe.py", "environment": environment(str(device)), "rows": rows}
    write_json(RESULT, content)


if __name__ == "__main__":
    main()
