"""Model cards of runs whose names hold any characters: head, code and text show them as they are."""

import ast
import re
from html import unescape

import pytest
from conftest import build_vit

from abm_vision.images.card import model_card
from abm_vision.vtab import results
from nlp_ext.glue import results as glue
from nlp_ext.instruct import results as instruct

ODD = 'm|x <b>"q"</b> `c` _d_ *k* [i](j) #1 $a$ {b}: - \\n\nl'
SHOWN = " ".join(ODD.split())
CONFIG = {
    **dict.fromkeys(("model", "targets", "init", "weights", "data"), ODD),
    **{
        "task": "dtd",
        "rank": 4,
        "qkv": "full",
        "epochs": 1,
        "seed": 0,
        "image_size": 32,
        "base": "fp32",
        "max_steps": 0,
    },
}
TEST = {"split": "test", "top1": 0.5, "count": 60}


def vision():
    data = dict.fromkeys(("train", "test"), {"images": 60, "description": f"folder: {ODD}"})
    weights = {"origin": "file", "sha256": "0" * 64}
    text = results.model_card({"config": CONFIG, "test": TEST, "weights": weights, "data": data, "num_classes": 47})
    facts = {"model": ODD, "hub": f"timm/{ODD}", "license": ODD, "num_classes": 2, "classes": [ODD, "b"], "init": ODD}
    return model_card({**facts, "weights": weights}, build_vit(), text)


def language(module, tiny):
    data = {"train": {"source": ODD, "examples": 5, "conversations": 5}}
    weights = {"location": ODD, "revision": None if tiny else ODD, "sha256": "0" * 64, "dequantised": None}
    scores = {"loss_per_step": [1.0], "scores": {}, "perplexity": {"before": 2.0, "after": 1.0}}
    with pytest.MonkeyPatch.context() as patch:  # the words for scores have no names
        patch.setattr(module, "scores_in_words" if module is glue else "perplexity_in_words", lambda result: "0.5")
        return module.model_card({"config": CONFIG, "data": data, "weights": weights, "tiny": tiny, **scores})


CARDS = {
    "vision": vision,
    "glue": lambda: language(glue, False),
    "glue, tiny": lambda: language(glue, True),
    "instruct": lambda: language(instruct, False),
    "instruct, tiny": lambda: language(instruct, True),
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_shows_names_as_they_are(name):
    yaml, markdown = pytest.importorskip("yaml"), pytest.importorskip("markdown")
    _, head, text = CARDS[name]().split("---\n", 2)
    found = yaml.safe_load(head)
    assert set(found) <= {"library_name", "base_model", "tags"} and found["library_name"] == "peft"
    assert ("tiny" in name) != (found.get("base_model", "").removeprefix("timm/") == ODD)
    (code,) = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    strings = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert ODD in strings
    page = markdown.markdown(re.sub(r"```python\n.*?\n```", "", text, flags=re.DOTALL))
    assert set(re.findall(r"<(\w+)", page)) == {"h1", "p", "code"}
    shown = unescape(re.sub(r"<[^>]*>", "", page))
    assert SHOWN in shown.splitlines()[0] and shown.count(SHOWN) >= 4
