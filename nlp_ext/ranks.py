"""Several processes of one run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import nn

from abm_vision.runs.device import resolve_device


def join(cpu: bool) -> PartialState:
    """This process among those of the run; the only one if nothing launched several."""
    return PartialState(cpu=cpu)


def text_device(name: str) -> torch.device:
    """The device of this process: the Trainer takes the first visible GPU, or of several processes one each.

    Raises:
        ValueError: another GPU is named, which the Trainer would not use.
    """
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index != 0:
        raise ValueError(f"device is {name!r}; choose a GPU by CUDA_VISIBLE_DEVICES={device.index} and --device cuda")
    state = PartialState()
    return state.device if state.num_processes > 1 else device


@torch.no_grad()
def same_on_all_ranks(model: nn.Module) -> None:
    """Give every process the trained parameters of the first, so that all begin with the same adapter.

    Every process runs the start itself, on the same samples and with the same seed; what other hardware or kernels
    would make of it must not drive them apart.
    """
    if PartialState().num_processes > 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(broadcast(parameter.detach().clone(), from_process=0))
