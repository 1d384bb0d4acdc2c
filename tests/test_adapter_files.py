"""Saved adapters: peft's own files, read by stock peft without this package, and read back by it."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import timm
import torch
from conftest import build_vit, images, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file

from abm_vision import ABMConfig, add_lora, check_adapters, initialize_lora_abm_weights, load_adapter, save_adapter
from abm_vision.abm.files import write_atomically, write_json
from abm_vision.abm.merged_linear import BlockLinear, MergedLinear

CHOICES = [
    {},
    {"targets": "attention", "rslora": True},
    {"targets": "mlp", "rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 3}},
    {"qkv": "qv"},
    {"qkv": "qv", "targets": ["attn.qkv"], "rslora": True},
    {"dora": True, "dropout": 0.1},
]

STOCK = """
import sys, timm, torch
from peft import PeftModel
base, batch, out, *folders = sys.argv[1:]
x, results = torch.load(batch, weights_only=True), []
for folder in folders:
    model = timm.create_model("test_vit", img_size=32, num_classes=5)
    model.load_state_dict(torch.load(base, weights_only=True))
    model = PeftModel.from_pretrained(model, folder).eval()
    results.append([model(x).detach(), model.merge_and_unload()(x).detach()])
torch.save(results, out)
assert not [m for m in sys.modules if m.startswith("abm_vision")]
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every choice of adapter, saved: folder and the outputs that it stands for."""
    rows = []
    for i, options in enumerate(CHOICES):
        folder = tmp_path_factory.mktemp(f"choice{i}")
        model = randomise(add_lora(build_vit(), 4, **options)).eval()
        with torch.no_grad():
            model.get_base_model().head.weight.add_(0.5)
        save_adapter(model, folder)
        rows.append((folder, model(images()).detach()))
    return rows


@pytest.fixture(scope="module")
def stock_outputs(saved, tmp_path_factory):
    """What stock peft computes from the same files, adapted and merged, in a process without this package."""
    folder = tmp_path_factory.mktemp("stock")
    torch.save(build_vit().state_dict(), folder / "base.pt")
    torch.save(images(), folder / "batch.pt")
    paths = [folder / "base.pt", folder / "batch.pt", folder / "out.pt", *(f for f, _ in saved)]
    command = [sys.executable, "-W", "error::UserWarning", "-c", STOCK, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "out.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("choice", range(len(CHOICES)), ids=[str(c) for c in CHOICES])
def test_stock_peft_loads_it_in_a_process_without_this_package(saved, stock_outputs, choice):
    for output in stock_outputs[choice]:
        torch.testing.assert_close(output, saved[choice][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("choice", range(len(CHOICES)), ids=[str(c) for c in CHOICES])
@pytest.mark.parametrize("merged_linear", [True, False])
def test_load_adapter_gives_the_same_model_back(saved, choice, merged_linear):
    folder, expected = saved[choice]
    model = load_adapter(build_vit(), folder, merged_linear=merged_linear).eval()
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)
    assert not any(p.requires_grad for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, MergedLinear)]
    assert bool(layers) is merged_linear


def test_files_are_pefts_and_the_config_is_plain_lora(tmp_path):
    model = add_lora(build_vit(), qkv="qv")
    config = ABMConfig(steps=2, samples=4)
    report = initialize_lora_abm_weights(model, [images()], config, show_progress_bar=False)
    save_adapter(model, tmp_path, report=report.to_dict())
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "abm.json"}
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["init_lora_weights"] is True and saved["peft_type"] == "LORA"
    assert set(saved) == set(LoraConfig().to_dict())
    abm = json.loads((tmp_path / "abm.json").read_text())
    assert abm["report"]["config"]["margin"] == 0.5
    assert abm["qv_only"] == [f"blocks.{i}.attn.qkv" for i in range(6)]
    weights = load_file(tmp_path / "adapter_model.safetensors")
    assert weights["base_model.model.head.weight"].shape == (5, 64)
    assert not any("mask" in name or name.endswith("base_layer.weight") for name in weights)
    b = weights["base_model.model.blocks.0.attn.qkv.lora_B.weight"]
    assert b.shape == (192, 16) and not b[64:128].any() and b[:64].any()


def test_qv_adapter_trained_on_keeps_k_at_zero(saved):
    model = load_adapter(build_vit(), saved[3][0], is_trainable=True)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(images()).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
    layer = model.get_base_model().blocks[2].attn.qkv.lora_B["default"]
    assert isinstance(layer, BlockLinear) and not layer.weight[64:128].any()


def test_adapter_of_stock_peft_loads_here(tmp_path):
    torch.manual_seed(0)
    stock = get_peft_model(build_vit(), LoraConfig(r=3, target_modules=["mlp.fc1"], modules_to_save=["head"]))
    randomise(stock).save_pretrained(tmp_path)
    model = load_adapter(build_vit(), tmp_path, is_trainable=True)
    torch.testing.assert_close(model.eval()(images()), stock.eval()(images()))


def test_several_adapters_each_in_its_folder(tmp_path):
    model = randomise(add_lora(build_vit(), 2))
    randomise(add_lora(model, 4, qkv="qv", adapter_name="second"), adapter="second").eval()
    outputs = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model(images())
    save_adapter(model, tmp_path, report="of the active one")
    settings = [json.loads((folder / "abm.json").read_text()) for folder in (tmp_path, tmp_path / "second")]
    assert "report" not in settings[0] and settings[1]["report"] == "of the active one"
    for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
        loaded = load_adapter(build_vit(), folder).eval()
        torch.testing.assert_close(loaded(images()), outputs[name])
    both = load_adapter(build_vit(), tmp_path).train()
    load_adapter(both, tmp_path / "second", adapter_name="second")
    assert both.training and both.active_adapters == ["default"]
    both.eval()
    for name in ("default", "second", "default"):
        both.set_adapter(name)
        torch.testing.assert_close(both(images()), outputs[name])


def test_bypassed_qkv_runs_after_loading(tmp_path):
    def beit():
        return build_vit("beit_base_patch16_224", depth=1, embed_dim=48, num_heads=2).eval()

    model = randomise(add_lora(beit())).eval()
    save_adapter(model, tmp_path)
    assert not torch.allclose(model(images()), beit()(images()), atol=1e-3)
    torch.testing.assert_close(load_adapter(beit(), tmp_path).eval()(images()), model(images()))


def test_stock_from_pretrained_with_this_package_imported(saved):
    folder, expected = saved[0]
    torch.testing.assert_close(PeftModel.from_pretrained(build_vit(), folder).eval()(images()), expected)


def test_loading_what_is_not_there_or_no_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json in .*pass a folder that save_adapter wrote"):
        load_adapter(build_vit(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "target_modules": ["mlp.fc1"]}))
    with pytest.raises(ValueError, match="peft_type 'IA3'; only LoRA adapters"):
        load_adapter(build_vit(), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["mlp.fc1"]}))
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors in"):  # peft would ask a hub
        load_adapter(build_vit(), tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("name", ["adapter_config.json", "abm.json"])
def test_damaged_files_are_named(saved, tmp_path, name, content):
    shutil.copytree(saved[0][0], tmp_path / "adapter")
    (tmp_path / "adapter" / name).write_text(content)
    with pytest.raises(
        ValueError, match=rf"{name} (is not JSON .*|holds no JSON object); save or copy the adapter again"
    ):
        load_adapter(build_vit(), tmp_path / "adapter")


def test_an_adapter_that_does_not_fit_leaves_nothing(saved):
    model = add_lora(build_vit(num_classes=7))
    with pytest.raises(ValueError, match="does not fit this model, or is damaged: .*size mismatch"):
        load_adapter(model, saved[0][0], adapter_name="other")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="does not fit this model"):
        load_adapter(build_vit(num_classes=7), saved[0][0])


def test_saved_modules_that_the_model_lacks(tmp_path):
    """peft itself writes "classifier" and "score" for a sequence classifier, of which a model has one."""
    config = LoraConfig(target_modules=["mlp.fc1"], modules_to_save=["head", "score"])
    model = get_peft_model(build_vit(), config)
    check_adapters(model, images())
    model.save_pretrained(tmp_path)
    save_adapter(load_adapter(build_vit(), tmp_path), tmp_path / "again")


def test_settings_of_another_format(saved, tmp_path):
    model = add_lora(build_vit())
    save_adapter(model, tmp_path)
    (tmp_path / "abm.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="has format 2, this version reads 1"):
        load_adapter(build_vit(), tmp_path)


def test_loading_onto_a_model_that_has_this_adapter(saved):
    model = load_adapter(build_vit(), saved[0][0])
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        load_adapter(model, saved[0][0])


def test_files_are_whole_or_absent(tmp_path):
    target = tmp_path / "file.json"
    write_json(target, {"a": 1})

    def fail(path):
        path.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(target, fail)
    assert json.loads(target.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [target]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"a": float("nan")})
    assert json.loads(target.read_text()) == {"a": 1}


# What is not whole is not loaded


def changed_tensors(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def changed_json(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def without(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def with_a_seventh_block(tensors):
    tensors.update({name.replace("blocks.5", "blocks.6"): value.clone() for name, value in tensors.items()})


def with_nan(tensors):
    next(value for name, value in tensors.items() if "lora_A" in name)[0, 0] = float("nan")


DAMAGED = {
    "a block is missing": (lambda f: changed_tensors(f, without("blocks.1.")), r"lacks .*blocks\.1\..* more"),
    "a factor is missing": (
        lambda f: changed_tensors(f, without("blocks.1.mlp.fc1.lora_B")),
        r"lacks .*blocks\.1\.mlp",
    ),
    "the head is missing": (lambda f: changed_tensors(f, without("head")), r"lacks .*head\.bias"),
    "nothing is there": (lambda f: changed_tensors(f, dict.clear), "lacks"),
    "a layer too many": (
        lambda f: changed_tensors(f, with_a_seventh_block),
        r"the model lacks the layers of .*blocks\.6\.",
    ),
    "a base weight": (
        lambda f: changed_tensors(f, lambda t: t.update({"base_model.model.norm.weight": torch.ones(64)})),
        r"holds base_model\.model\.norm\.weight, of no LoRA layer and of no module .* saves \(head\)",
    ),
    "not finite": (lambda f: changed_tensors(f, with_nan), "lora_A.weight is NaN or infinite"),
    "no lora_alpha": (
        lambda f: changed_json(f, "adapter_config.json", lambda c: c.pop("lora_alpha")),
        "lacks lora_alpha, which decides",
    ),
    "no r": (lambda f: changed_json(f, "adapter_config.json", lambda c: c.pop("r")), "lacks r, which decides"),
    "r is text": (
        lambda f: changed_json(f, "adapter_config.json", lambda c: c.update(r="4")),
        "has r '4', it must be a whole number",
    ),
    "rsLoRA is text": (
        lambda f: changed_json(f, "adapter_config.json", lambda c: c.update(use_rslora="no")),
        "has use_rslora 'no', it must be true or false",
    ),
    "no regular expression": (
        lambda f: changed_json(f, "adapter_config.json", lambda c: c.update(target_modules="attn.(")),
        "does not fit this model, or is damaged: .*unterminated subpattern",
    ),
    "another r": (lambda f: changed_json(f, "adapter_config.json", lambda c: c.update(r=3)), "size mismatch"),
    "abm.json without fields": (
        lambda f: (f / "abm.json").write_text('{"format": 1}'),
        "qv_only None, it must be a list",
    ),
    "abm.json of other types": (
        lambda f: changed_json(f, "abm.json", lambda c: c.update(qv_only="blocks.0.attn.qkv")),
        "qv_only 'blocks.0.attn.qkv', it must be a list of module names",
    ),
    "q and v of an fc1": (
        lambda f: changed_json(f, "abm.json", lambda c: c.update(qv_only=["blocks.0.mlp.fc1"])),
        r"says that blocks\.0\.mlp\.fc1 adapts q and v alone, and it is no adapted fused qkv",
    ),
    "q and v of a whole qkv": (
        lambda f: changed_json(f, "abm.json", lambda c: c.update(qv_only=["blocks.0.attn.qkv"])),
        "a lora_B for q and v alone has values outside its two blocks: it adapts k as well",
    ),
    "pickled objects": (
        lambda f: [(f / "adapter_model.safetensors").unlink(), torch.save({"a": pickled}, f / "adapter_model.bin")],
        r"adapter_model\.bin cannot be read: damaged, or pickled objects, which are never loaded",
    ),
    "half a file": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"half a file"),
        r"adapter_model\.safetensors cannot be read",
    ),
}


def pickled():
    raise AssertionError("a pickle was loaded")


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_that_is_not_whole_is_not_loaded(saved, tmp_path, kind, beside):
    damage, message = DAMAGED[kind]
    folder = tmp_path / "adapter"
    shutil.copytree(saved[0][0], folder)
    damage(folder)
    model = add_lora(build_vit()) if beside else build_vit()
    model.eval()
    before, flags = {n: v.clone() for n, v in model.state_dict().items()}, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder, adapter_name="other")
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], v) for n, v in before.items())
    assert flags == [p.requires_grad for p in model.parameters()]
    if not beside:  # it can be tried again
        load_adapter(model, saved[0][0], adapter_name="other")


def test_tensors_pickled_by_torch_are_read(saved, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(saved[0][0], folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    torch.testing.assert_close(load_adapter(build_vit(), folder).eval()(images()), saved[0][1])


def test_a_whole_adapter_swapped_into_one_for_q_and_v_is_saved_whole(saved, tmp_path):
    plain = {"targets": ["attn.qkv"], "modules_to_save": []}
    same = {"rank_pattern": {"attn.qkv": 4}, "alpha_pattern": {"attn.qkv": 8}}  # as peft's check wants it
    whole = randomise(add_lora(build_vit(), 2, 4, **plain, **same)).eval()
    save_adapter(whole, tmp_path / "whole")
    model = add_lora(build_vit(), 2, 4, **plain, qkv="qv").eval()
    hotswap_adapter(model, str(tmp_path / "whole"), "default", torch_device="cpu")
    torch.testing.assert_close(model(images()), whole(images()))
    save_adapter(model, tmp_path / "swapped")
    assert json.loads((tmp_path / "swapped" / "abm.json").read_text())["qv_only"] == []
    torch.testing.assert_close(load_adapter(build_vit(), tmp_path / "swapped").eval()(images()), whole(images()))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_stock_peft_trains_are_loaded(tmp_path, bias):
    config = LoraConfig(target_modules=["mlp.fc1"], bias=bias, init_lora_weights=False)
    model = get_peft_model(build_vit(), config).eval()
    with torch.no_grad():
        model.base_model.model.blocks[0].mlp.fc1.base_layer.bias.add_(1)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(load_adapter(build_vit(), tmp_path).eval()(images()), model(images()))


@pytest.mark.parametrize(
    "change", [{"lora_alpha": float("nan")}, {"lora_dropout": float("nan")}, {"modules_to_save": [1]}]
)
def test_numbers_that_are_none(saved, tmp_path, change):
    shutil.copytree(saved[0][0], tmp_path / "adapter")
    changed_json(tmp_path / "adapter", "adapter_config.json", lambda c: c.update(change))
    (name,) = change
    with pytest.raises(ValueError, match=f"adapter_config.json has .*{name.removeprefix('lora_')}"):
        load_adapter(build_vit(), tmp_path / "adapter")


def test_modules_in_two_places_are_not_called_missing(tmp_path, recwarn):
    """CoaT runs one MLP at several places; its tensors are in the file once."""
    model = timm.create_model("coat_tiny", num_classes=3, img_size=64)
    adapted = randomise(add_lora(copy.deepcopy(model), rank=2)).eval()
    save_adapter(adapted, tmp_path)
    loaded = load_adapter(model, tmp_path)
    assert not recwarn
    torch.testing.assert_close(loaded(images(2, 64)), adapted(images(2, 64)))
