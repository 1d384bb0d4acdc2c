"""docs/troubleshooting.md: every message that the product may give has a family, and real ones are found there."""

import re

import messages
import numpy as np
import pytest
import torch
import yaml
from conftest import build_vit

import vtab_tasks
from abm_vision import add_lora, create_backbone, initialize_lora, load_adapter, save_adapter
from abm_vision.tune import make_config as own_images
from abm_vision.tune import run as tune
from abm_vision.vtab import make_config
from nlp_ext.rows import read_rows

FOUND = messages.messages()
FAMILIES = messages.families()
LIST = yaml.safe_load(messages.FAMILIES.read_text())
RULES = {words: family["title"] for family in FAMILIES for words in family["says"]}
RULES |= dict.fromkeys(LIST["passed on"], "passed on")


def families_of(text):
    return {title for words, title in RULES.items() if re.search(words, text)}


def test_every_message_has_one_family():
    """One that has none is to be added to `says` of a family of docs/messages.yaml."""
    assert {text: found for text in FOUND if len(found := families_of(text)) != 1} == {}


def test_no_rule_is_left_over():
    assert [words for words in RULES if not any(re.search(words, text) for text in FOUND)] == []


def test_families_are_whole():
    assert all({"topic", "title", "says", "means", "do"} == set(family) for family in FAMILIES)
    assert len({family["title"] for family in FAMILIES}) == len(FAMILIES) <= 90


def test_the_first_words_of_every_raise_are_there():
    """Read without a parser: the text after `raise Error(`, up to its first hole."""
    known = "\n".join(FOUND)
    for package in messages.PACKAGES:
        for path in (messages.ROOT / package).rglob("*.py"):
            for _, text in re.findall(r"raise [\w.]+\(\s*f?(['\"])(.*?)\1", path.read_text()):
                pieces = re.split(r"\{[^}]*\}?|\\n|[\\'\"]", text)
                longest = " ".join(max(pieces, key=len).split())
                assert longest in known, f"{path.name}: {text}"


def nan_in_the_head(folder):
    model = add_lora(build_vit())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(np.nan)
    save_adapter(model, folder / "adapter")


REAL = [
    (lambda folder: vtab_tasks.get_task("petz"), "A task, split or source does not exist"),
    (lambda folder: vtab_tasks.load("pets", "test", source="rendered"), "There are no data for a task"),
    (lambda folder: vtab_tasks.load("pets", "test", source="folder", data_dir=folder), "There are no data for a task"),
    (lambda folder: vtab_tasks.load("pets", "test", data_dir=folder), "There are no data for a task"),
    (lambda folder: make_config(lr=-1.0), "A value is out of range or of another type"),
    (lambda folder: make_config(stepz=3), "An unknown command, setting, or one for another initialisation"),
    (lambda folder: make_config(init="abmm"), "An unknown initialisation, or a plugin that cannot be imported"),
    (lambda folder: make_config(plugin="not_there"), "An unknown initialisation, or a plugin that cannot be imported"),
    (lambda folder: create_backbone("vit_nope", 3), "An unknown model, or one that cannot have this size"),
    (lambda folder: add_lora(torch.nn.Linear(2, 2)), "The model is not supported"),
    (lambda folder: add_lora(add_lora(build_vit())), "The model has an adapter already, or none"),
    (lambda folder: add_lora(build_vit(), targets=["nope"]), "The targets do not fit the model"),
    (lambda folder: initialize_lora(add_lora(build_vit()), "abm", []), "The loader yields no batches"),
    (lambda folder: load_adapter(folder), "The folder holds no adapter"),
    (nan_in_the_head, "Something cannot be saved"),
    (lambda folder: tune(own_images(data=str(folder)), folder / "out"), "The folder is not one folder for each class"),
    (lambda folder: read_rows(folder / "no.jsonl"), "A file of text is missing, or in a form that is not read"),
]


@pytest.mark.parametrize(("call", "title"), REAL)
def test_a_real_message_is_found(tmp_path, call, title):
    """By its words, as a reader would: the message is one of the page with its holes filled."""
    with pytest.raises((ValueError, OSError)) as caught:
        call(tmp_path)
    said = " ".join(str(caught.value).split())
    fits = [text for text in FOUND if re.fullmatch(".*".join(map(re.escape, text.split(messages.HOLE))), said)]
    best = max(fits, key=lambda text: len(text.replace(messages.HOLE, "")))
    assert families_of(best) == {title}
