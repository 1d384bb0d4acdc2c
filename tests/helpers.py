"""What tests of several files share: two models side by side, all that a model is, small runs, the real command."""

import copy
import random
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, build_vit, images
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from abm_vision import INITIALIZERS, ABMConfig, initialize_lora_abm_weights
from abm_vision.abm.adapter import adapted_layers
from abm_vision.runs import checkpoint
from abm_vision.vtab import make_config, run
from abm_vision.vtab.__main__ import main
from nlp_ext.glue.config import GlueConfig
from nlp_ext.instruct.config import InstructConfig

ACTS = [f"blocks.{i}.mlp.act" for i in range(6)]
FAST = ABMConfig(steps=3, samples=8, learning_rate=0.01)
FLAGS = [word for key, value in TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
GLUE = {  # settings of a run on `t5` that takes seconds
    "task": "rte",
    "data": "synthetic",
    "rank": 2,
    "abm_samples": 16,
    "abm_steps": 2,
    "epochs": 2,
    "train_examples": 80,
    "validation_examples": 12,
    "batch_size": 16,
    "precision": "fp32",
}
INSTRUCT = {  # the same on `llama`
    "data": "synthetic",
    "rank": 2,
    "abm_samples": 16,
    "abm_steps": 2,
    "epochs": 2,
    "train_examples": 80,
    "held_out": 10,
    "samples": 1,
    "new_tokens": 8,
    "batch_size": 16,
    "precision": "fp32",
}
COMMAND = [sys.executable, "-m", "abm_vision.vtab"]


# Small models


def small_vit():
    return build_vit(embed_dim=32, depth=2, num_heads=2).eval()


def trained(model, x, y, steps=3):
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval()


# Matching, and the same by hand


def fast(name):
    """Settings for few steps, of the class that the initialisation takes; None for its defaults."""
    return FAST if INITIALIZERS[name].config is ABMConfig else None


def match(model, batches=None, config=FAST, **options):
    batches = [images(4, seed=s) for s in range(2)] if batches is None else batches
    return initialize_lora_abm_weights(model, batches, config, show_progress_bar=False, **options)


def factors(model, adapter="default"):
    return {n: p for n, p in model.named_parameters() if f".{adapter}." in n and "lora_" in n}


def values(model, adapter="default"):
    return {n: p.detach().clone() for n, p in factors(model, adapter).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def record(model, batch, names=ACTS):
    """Pre-activations by plain hooks on a bare model or on an adapted one."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    z = {}
    handles = [
        bare.get_submodule(n).register_forward_pre_hook(lambda m, args, n=n: z.update({n: args[0]})) for n in names
    ]
    model(batch)
    for handle in handles:
        handle.remove()
    return z


def figures(adapted, reference, batches, margin, names=ACTS):
    """Mean hinge loss, match rate and share inside the margin of each layer, from two models, in double precision."""
    rows = []
    for name in names:
        z = torch.cat([record(adapted, b)[name].detach().double() for b in batches])
        tau = torch.cat([record(reference, b)[name].detach() for b in batches]).sign().double()
        hinge = (margin - tau * z).clamp_min(0)
        rows.append([hinge.square().mean(), ((z > 0) == (tau > 0)).double().mean(), (tau * z < margin).double().mean()])
    return torch.tensor(rows)


def rows_of(report, moment):
    states = [getattr(layer, moment) for layer in report.layers]
    return torch.tensor([[s.loss, s.match, s.inside] for s in states], dtype=torch.float64)


def gradients_by_autograd(model, x, y, others=()):
    """dL/dW of every adapted layer, from a bare model whose weights are the merged ones."""
    bare = copy.deepcopy(model).merge_and_unload().eval()
    names = [*adapted_layers(model, "default"), *others]
    weights = [bare.get_submodule(name).weight.requires_grad_() for name in names]
    return dict(zip(names, torch.autograd.grad(F.cross_entropy(bare(x), y), weights), strict=True))


# All that a model is


def raw(tensor):
    return b"" if tensor.is_meta else tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def output(model, x):
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        return model(x)


_alive = []  # a module's id is its own for as long as it lives


def snapshot(model, x):
    """Everything that a verb could leave behind, by name."""
    found = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        _alive.append(tensor)
        found[f"value of {name}"] = tensor.dtype, tensor.device, raw(tensor)
        # accelerate makes offloaded parameters anew for every call
        found[f"tensor {name}"] = None if hasattr(model, "_hf_hook") else id(tensor), tensor.requires_grad
        found[f"gradient of {name}"] = None if tensor.grad is None else raw(tensor.grad)
    for name, module in model.named_modules(remove_duplicate=False):
        _alive.append(module)
        found[f"module {name}"] = id(module), module.training
        found[f"attributes of {name}"] = set(vars(module))
        found[f"hooks of {name}"] = {key: list(v) for key, v in vars(module).items() if key.endswith("_hooks") and v}
        if isinstance(module, LoraLayer):
            found[f"adapters of {name}"] = (
                *(copy.copy(v) for v in (module.scaling, module.r, module.lora_alpha, module.merged_adapters)),
                *(module.disable_adapters, list(module.active_adapters)),
            )
    found["configurations"] = {n: copy.deepcopy(config.to_dict()) for n, config in model.peft_config.items()}
    found["active adapters"] = list(model.active_adapters)
    found["random state of torch"] = raw(torch.get_rng_state())
    found["random state of Python"] = random.getstate()
    found["random state of NumPy"] = raw(torch.from_numpy(np.random.get_state()[1]))
    try:
        found["output"] = raw(output(model, x))
    except Exception as error:
        found["output"] = repr(error)
    return found


def changes(before, after, *but):
    """What was there and is no longer so, without those whose name a pattern of `but` finds."""
    changed = [name for name in before if name not in after or before[name] != after[name]]
    return [name for name in changed if not any(re.search(pattern, name) for pattern in but)]


# Runs and commands


def tiny(**changes):
    return make_config(**{**TINY, **changes})


def break_off(config, out, monkeypatch):
    """Kill a run after its first epoch."""
    original = checkpoint.save

    def killed(*arguments):
        original(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", killed)
        run(config, out)


def small_glue(base, **settings):
    return GlueConfig.make(**{**GLUE, "model": str(base), **settings})


def small_instruct(base, **settings):
    return InstructConfig.make(**{**INSTRUCT, "model": str(base), **settings})


def start(*words, **how):
    """The real command, in a process of its own."""

    def heed_interrupts():  # a shell's background jobs, and what they start, ignore SIGINT
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, words)], text=True, preexec_fn=heed_interrupts, **pipes, **how)


def answer(words, capsys, command=main):
    """Exit code, output and messages of a command, in this process."""
    capsys.readouterr()
    try:
        code = command([str(w) for w in words])
    except SystemExit as stop:  # argparse
        code = stop.code
    return code, *capsys.readouterr()


def refused(words, capsys):
    """The message that the command refuses `words` with."""
    code, _, err = answer(words, capsys)
    assert code == 2 and "Traceback" not in err and err.startswith("abm-vtab")
    return err
