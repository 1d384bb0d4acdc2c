"""Several processes of one run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import broadcast
from torch import nn


def join(cpu: bool) -> PartialState:
    """This process among those of the run; the only one if nothing launched several."""
    return PartialState(cpu=cpu)


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
