"""The processes of one run that `accelerate launch` or `torchrun` has launched."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, parse_flag_from_env
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule

from abm_vision.abm.base_change import changes_base, lora_layers
from abm_vision.runs.device import resolve_device
from abm_vision.runs.harness import Processes
from abm_vision.runs.settings import AdapterSettings


def refuse_deepspeed() -> None:
    """Raise a ValueError if the launcher has configured DeepSpeed."""
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed is configured, whose engine wraps the model so that its adapter can be neither shared nor "
            "gathered here: launch with accelerate launch --multi_gpu, or with --use_fsdp --fsdp_version 2 to shard"
        )


def join(cpu: bool) -> PartialState:
    """Join the processes of the run; without a launcher there is only this one.

    Raises:
        ValueError: DeepSpeed, or FSDP of the first version, is configured.
    """
    refuse_deepspeed()
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError("FSDP is of version 1, which hides LoRA's weights: accelerate launch --fsdp_version 2")
        # Every process needs the whole model for the initialisation; the Trainer shards it afterwards.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return PartialState(cpu=cpu)


def processes(config: AdapterSettings) -> Processes:
    """Those of a run, as the spine takes them; this one has joined the others.

    Raises:
        ValueError: as `join`, or the best weights are to be kept of a model that FSDP will shard.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and getattr(config, "keep", "last") == "best":
        raise ValueError("keep is best, but FSDP shards the model: --keep last")
    state = join(cpu=resolve_device(config.device).type == "cpu")
    return Processes(
        state.is_main_process, state.num_processes, state.wait_for_everyone, same_on_all_ranks, whole_state
    )


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP has given every process a part of the model."""
    return isinstance(model, FSDPModule)


def whole_state(model: nn.Module) -> dict[str, Tensor] | None:
    """Gather the trained parameters of a model that FSDP has sharded in the first process; None if it is not sharded.

    Every process must call this.
    """
    if not is_sharded(model):
        return None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def text_device(name: str) -> torch.device:
    """Return this process's device: the Trainer uses the first visible GPU, or one GPU per process.

    Raises:
        ValueError: another GPU is named, which the Trainer would not use; or DeepSpeed is configured.
    """
    refuse_deepspeed()
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index != 0:
        raise ValueError(f"device is {name!r}; choose a GPU by CUDA_VISIBLE_DEVICES={device.index} and --device cuda")
    state = PartialState()
    return state.device if state.num_processes > 1 else device


def as_the_first(decision: bool) -> bool:
    """Return what the first process has decided, of what each sees differently, such as its clock."""
    state = PartialState()
    if state.num_processes == 1:
        return decision
    return bool(broadcast(torch.tensor(int(decision), device=state.device), from_process=0))


@torch.no_grad()
def same_on_all_ranks(model: PeftModel) -> None:
    """Broadcast the initialisation of the first process, so that all train the same model.

    Every process runs the initialisation, on the same samples and with the same seed; other hardware or kernels may
    still give another result (a singular vector of the other sign).
    """
    if PartialState().num_processes > 1:
        for tensor in _initialised(model):
            tensor.copy_(broadcast(tensor.detach().clone(), from_process=0))


def _initialised(model: PeftModel) -> Iterator[Tensor]:
    """Trained parameters, frozen factors and, if the base weights were changed, those and the initial factors."""
    yield from (p for n, p in model.named_parameters() if p.requires_grad or ".lora_" in n)
    if any(changes_base(config) for config in model.peft_config.values()):
        for _, layer in lora_layers(model):
            yield layer.get_base_layer().weight
            yield from layer.buffers(recurse=False)
