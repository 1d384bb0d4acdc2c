"""Several processes of one run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, parse_flag_from_env
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from abm_vision.abm.adapter import changes_base
from abm_vision.runs.device import resolve_device
from abm_vision.runs.harness import Processes
from abm_vision.runs.settings import AdapterSettings


def join(cpu: bool) -> PartialState:
    """This process among those of the run; the only one if nothing launched several.

    Raises:
        ValueError: FSDP of the first version is asked for.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("FSDP is of version 1, which hides LoRA's weights: accelerate launch --fsdp_version 2")
        # Every process needs the whole model for the initialisation; the Trainer shards it afterwards.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return PartialState(cpu=cpu)


def processes(config: AdapterSettings) -> Processes:
    """Those of a run, as the spine takes them; this one has joined the others."""
    state = join(cpu=resolve_device(config.device).type == "cpu")
    return Processes(state.is_main_process, state.num_processes, state.wait_for_everyone, same_on_all_ranks)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained parameters of a model that FSDP has sharded, whole, in the first process; None if it is not sharded.

    Every process must call it.
    """
    if not isinstance(model, FSDPModule):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


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
def same_on_all_ranks(model: PeftModel) -> None:
    """Give every process what the initialisation has made in the first, so that all train the same model.

    Every process initialises its own, on the same samples and with the same seed; what other hardware or kernels
    would make of it (a singular vector of the other sign) must not drive them apart.
    """
    if PartialState().num_processes > 1:
        for tensor in _initialised(model):
            tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))


def _initialised(model: PeftModel) -> Iterator[Tensor]:
    """What trains, frozen factors; of an initialisation that changes base weights, those and the factors it keeps."""
    yield from (p for n, p in model.named_parameters() if p.requires_grad or ".lora_" in n)
    if any(changes_base(config) for config in model.peft_config.values()):
        for layer in (m for m in model.modules() if isinstance(m, LoraLayer)):
            yield layer.get_base_layer().weight
            yield from layer.buffers(recurse=False)
