"""The Triton kernels without a GPU, in Triton's interpreter, against plain products."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import build_vit, images, randomise
from torch import Tensor

from abm_vision import add_lora
from abm_vision.abm import kernels

triton = pytest.importorskip("triton", reason="Triton is not installed")

CODE = """
import torch
from abm_vision.abm import kernels

torch.manual_seed(0)
torch.cuda.current_device = lambda: -1
kernels.OUTER["SEGMENT"] = 64
for tokens, in_, out, rank in ((100, 70, 33, 3), (130, 64, 192, 8), (70, 33, 40, 17), (1, 5, 7, 1)):
    weight, a, b = torch.randn(out, in_), torch.randn(rank, in_), torch.randn(out, rank)
    assert not kernels.kernels_fit(weight, a, b, torch.bfloat16)  # they are for CUDA
    torch.testing.assert_close(kernels.merge(weight, a, b, 0.7, torch.float32), weight + 0.7 * b @ a)
    x, grad = torch.randn(tokens, in_ + 5)[:, :in_], torch.randn(tokens, out)
    found = kernels.factor_gradients(x, a, grad, b, 0.7)
    expected = 0.7 * (grad @ b).T @ x, 0.7 * grad.T @ (x @ a.T)
    torch.testing.assert_close(found, torch.cat([e.flatten() for e in expected]), rtol=1e-4, atol=1e-3)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves: test_gpu.py")
def test_kernels_give_what_plain_products_give():
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def plain_merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return (weight + scaling * lora_b @ lora_a).to(dtype)


def plain_gradients(x: Tensor, lora_a: Tensor, grad: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    x, lora_a, grad, lora_b = (t.float() for t in (x, lora_a, grad, lora_b))
    return scaling * torch.cat([((grad @ lora_b).T @ x).flatten(), (grad.T @ (x @ lora_a.T)).flatten()])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_layer_with_kernels_is_the_layer_without(compiled, monkeypatch):
    """The kernels' places taken by plain products, the layer run through them eagerly and compiled."""
    for op, plain in ((kernels.merge_op, plain_merge), (kernels.factor_gradients_op, plain_gradients)):
        op.register_kernel("cpu", plain)
    used = []
    fits = lambda *tensors: used.append(1) or tensors[-1] == torch.bfloat16  # noqa: E731
    monkeypatch.setattr(kernels, "merge", plain_merge)
    monkeypatch.setattr(kernels, "factor_gradients", plain_gradients)
    found = []
    for with_kernels in (False, True):
        if with_kernels:
            monkeypatch.setattr(kernels, "kernels_fit", fits)
        torch.manual_seed(0)
        model = randomise(add_lora(build_vit(depth=2), rank=4, alpha=8), 0.2).train()
        if compiled:
            for block in model.get_base_model().blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(images(32)).float().square().mean()
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert used and found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 0.02 * gradient.norm()


@pytest.mark.parametrize(
    ("capability", "rank", "shared"), [(90, 8, 232_448), (86, kernels.RANKS, 101_376), (120, kernels.RANKS, 101_376)]
)
def test_kernels_compile_for_a_gpu(capability, rank, shared):
    """What the interpreter takes need not be what the compiler takes; no GPU is needed for it.

    `shared`: bytes of shared memory that a block of that GPU may take (CUDA's programming guide).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    half, single, whole = "*bf16", "*fp32", "i32"
    sides = {"x": half, "g": half, "tokens": whole, "in_features": whole, "out_features": whole}
    sides |= {"stride_x": whole, "stride_g": whole, "thin": half}
    ranks = {"RANK": rank, "PADDED": max(16, rank)}
    of_weight = {"weight": single, "a": single, "b": single, "merged": half}
    of_weight |= {"scaling": "fp32", "out_features": whole, "in_features": whole}
    for kernel, types, constants in (
        (kernels._merge, of_weight, {"RANK": rank, **kernels.MERGE}),
        (kernels._thin, {**sides, "a": single, "b": single}, {**ranks, **kernels.THIN}),
        (kernels._outer, {**sides, "partial": single, "scaling": "fp32"}, {**ranks, **kernels.OUTER}),
    ):
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        aligned = {  # as launches are: addresses and sizes of 16 times something take more shared memory
            (k,): [["tt.divisibility", 16]]
            for k, name in enumerate(kernel.arg_names)
            if name in types and types[name] != "fp32" and name != "tokens"
        }
        source = ASTSource(kernel, signature, values, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.asm["cubin"] and compiled.metadata.shared <= shared


DRIVER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

launches = []


class Utils:  # what would load a kernel on a GPU
    load_binary = staticmethod(lambda name, *_: (object(), name, 32, 0, 1024))
    unload_module = staticmethod(lambda module: None)
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})


class Driver:
    utils = Utils()
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

    def launcher_cls(self, source, metadata):
        def launch(*words):
            words = [w.data_ptr() if isinstance(w, torch.Tensor) else w for w in words]
            launches.append([w for w in words if isinstance(w, (int, float, str))])

        return launch


driver.set_active(Driver())
from abm_vision.abm import kernels

torch.cuda.current_device = lambda: -1
x, a, grad, b = torch.zeros(40, 48).half(), torch.zeros(4, 48), torch.zeros(40, 32).half(), torch.zeros(32, 4)
weight, partial = torch.zeros(32, 48), torch.zeros(1, 320)
merged, thin = torch.zeros(32, 48).half(), torch.zeros(2, 40, 16).half()
of_tensors = {(2, 40, 16): thin, (1, 320): partial}
torch.Tensor.new_empty = lambda self, *size, **_: of_tensors[size]
torch.empty_like = lambda tensor, dtype: merged
for scaling in (1, 1.0, 0.7):  # a whole number must not become a constant
    kernels.merge(weight, a, b, scaling, torch.float16)
    kernels.factor_gradients(x, a, grad, b, scaling)
assert len(launches) == 9 and len(kernels._BUILT) == 3
assert launches[:3] == launches[3:6], launches
assert [0.7 if word == 1.0 and isinstance(word, float) else word for word in launches[0]] == launches[6]
kernels.factor_gradients(torch.zeros(1921).half()[1:].view(40, 48), a, grad, b, 0.7)  # at another address
assert len(kernels._BUILT) == 3
"""


def test_what_is_built_is_launched_with_what_triton_launches_it_with():
    done = subprocess.run([sys.executable, "-c", DRIVER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
