"""The models that are pretrained here: reproducible, cached whole, learning something; their corpus."""

import ast
import json
from itertools import islice

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from nlp_ext import tiny
from nlp_ext.corpus import documentation
from nlp_ext.glue import synthetic
from nlp_ext.models import check_model
from nlp_ext.models.cached import RECIPE


@pytest.mark.slow
def test_the_corpus_is_the_documentation():
    texts = list(documentation())
    assert len(texts) > 5000 and min(map(len, texts)) >= 40
    assert " ".join(json.__doc__.split("\n\n")[0].split()) in texts  # of a module
    assert " ".join(ast.parse.__doc__.split("\n\n")[0].split()) in texts  # of a function
    assert list(islice(documentation(), 500)) == texts[:500]


def test_unlabelled_sentences_are_of_no_split():
    texts = synthetic.sentences(300)
    assert texts == synthetic.sentences(300) and len(set(texts)) > 290
    train = {
        " ".join(str(v) for k, v in e.items() if k not in ("label", "idx")) for e in synthetic.examples("rte", "train")
    }
    assert len(train & set(synthetic.sentences(2000))) < 20  # short sentences meet by chance


def test_gaps_hide_a_share_of_the_bytes():
    """Taking the gaps' bytes back into their places gives the window again."""
    windows = torch.randint(3, 200, (5, 100), generator=torch.Generator().manual_seed(1))
    batch = tiny.gaps(windows, torch.Generator().manual_seed(2))
    for window, source, target in zip(windows, batch["input_ids"], batch["labels"], strict=True):
        hidden, current = {}, None
        for token in target.tolist()[:-1]:
            if token > 203:
                current = hidden.setdefault(token, [])
            else:
                current.append(token)
        filled = [t for token in source.tolist()[:-1] for t in (hidden[token] if token > 203 else [token])]
        assert filled == window.tolist() and source[-1] == target[-1] == tiny.EOS
        assert (
            sum(map(len, hidden.values())) == round(tiny.NOISE * 100) and list(hidden) == [258, 257, 256][: len(hidden)]
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.MODELS)
def test_pretraining_is_reproducible_and_learns(name, monkeypatch):
    monkeypatch.setattr(tiny, "documentation", lambda: synthetic.sentences(300))
    monkeypatch.setattr(tiny, "GRAMMAR_SENTENCES", 300)
    monkeypatch.setattr(tiny, "BATCH", 4)
    one, two = (tiny.pretrain(name, steps=12) for _ in range(2))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    generator = torch.Generator().manual_seed(9)
    windows = tiny._windows([tiny._bytes(synthetic.sentences(300))] * 2, 64, generator)
    batch = tiny.gaps(windows, generator) if name == "tiny-t5" else {"input_ids": windows, "labels": windows}
    with torch.no_grad():
        assert one(**batch).loss < tiny.make_model(name)(**batch).loss


def test_the_cache_is_whole_and_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def pretrain(name, show_progress_bar):
        made.append(name)
        return tiny.make_model(name)

    monkeypatch.setattr(tiny, "pretrain", pretrain)
    said = []
    check_model("tiny-t5", AutoModelForSeq2SeqLM, said.append)
    folder = tiny.tiny_folder("tiny-t5")
    check_model("tiny-t5", AutoModelForSeq2SeqLM, said.append)
    assert said == ["weights   tiny-t5 is pretrained first, once: minutes on two cores"]
    assert tiny.tiny_folder("tiny-t5") == folder and made == ["tiny-t5"]
    assert folder.parent == tmp_path / "abm_lora" and not list(folder.parent.glob("*.part"))
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer("a").input_ids == [ord("a") + 3, 1] and model.config.vocab_size == 384
    (folder / RECIPE).unlink()  # half a model is made again
    tiny.tiny_folder("tiny-t5")
    assert made == ["tiny-t5"] * 2
    for name in ("model.safetensors", "config.json", RECIPE):  # so is a damaged one
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
        made.clear()
        assert tiny.tiny_folder("tiny-t5") == tiny.tiny_folder("tiny-t5") and made == ["tiny-t5"], name
    with pytest.raises(ValueError, match="unknown tiny model 'tiny-x'; there are tiny-t5, tiny-llama"):
        tiny.make_model("tiny-x")
