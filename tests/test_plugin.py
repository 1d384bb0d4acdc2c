"""An initialisation of one's own, in a file outside the package: every command, every way of running, its identity."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY

from abm_vision import INITIALIZERS, Initializer, register_initializer
from abm_vision.initializers import InitConfig, Needs, flag, load_plugin
from abm_vision.runs.settings import AdapterSettings
from abm_vision.vtab import HARNESS, make_config
from abm_vision.vtab.__main__ import main

PLUGIN = (Path(__file__).parent.parent / "examples" / "noise.py").read_text()  # as docs/own_initialisation.md shows it
OPTIONS = {**TINY, "epochs": 1, "test_images": 20}
WORDS = [f"--{k.replace('_', '-')}={v}" for k, v in OPTIONS.items() if not k.startswith("abm_")]
OWN = ["--plugin", "my_noise", "--noise-strength", "0.5"]


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "my_noise.py").write_text(PLUGIN)
    return tmp_path / "lib" / "my_noise.py"


def command(tmp_path, *words):
    """A command in a process of its own, which finds the plugin as a user's would."""
    path = os.pathsep.join([str(tmp_path / "lib"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "abm_vision.vtab", *words, "--out", str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def here(findable, tmp_path, capsys):
    """A command in this process, which imports the plugin anew."""

    def answer(*words, main=main):
        forget()
        code = main([*words, "--out", str(tmp_path / "out")])
        return code, *capsys.readouterr()

    return answer


def results(tmp_path):
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/result.json")]
    return {result["config"]["init"]: result["config"] for result in found}


@pytest.mark.slow
def test_a_run_its_identity_and_its_files(plugin, here, tmp_path):
    code, out, err = here(*WORDS, *OWN, "--init", "noise", "--json")
    assert code == 0, err
    result = json.loads(out)
    config = result["config"]
    assert config["plugin"] == "my_noise" and config["noise_strength"] == 0.5
    assert not [name for name in config if name.startswith(("align_", "abm_steps"))]
    # The file alone says where the initialisation is; nothing is run a second time.
    code, out, err = here("--config", f"{result['folder']}/config.json", "--noise-strength", "0.5", "--json")
    assert code == 0 and json.loads(out) == result, err
    plugin.write_text(PLUGIN.replace("std=", "mean=0.1, std="))
    code, _, err = here(*WORDS, *OWN, "--init", "noise")
    assert code == 2 and "was made with other content: initialisation (source" in err
    plugin.unlink()
    code, _, err = here("--config", f"{result['folder']}/config.json")
    assert code == 2 and "plugin is 'my_noise': no module named 'my_noise'" in err


@pytest.mark.slow
def test_suite_of_several_processes(plugin, here, tmp_path):
    suite = ["suite", "--tasks", "dsprites_loc", "--init", "noise,kaiming", *WORDS, *OWN]
    done = command(tmp_path, *suite, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert set(found) == {"noise", "kaiming"} and found["noise"]["noise_strength"] == 0.5
    assert "plugin" not in found["kaiming"] and "noise_strength" not in found["kaiming"]
    compare = ["compare", "--task", "dsprites_loc", "--init", "kaiming,noise", "--lr", "2e-3", "--seeds", "1", "--json"]
    code, out, err = here(*compare, *WORDS, *OWN)
    assert code == 0, err
    assert {row["init"] for row in json.loads(out)} == {"kaiming", "noise"}


@pytest.mark.slow
def test_text(here, t5, tmp_path):
    from nlp_ext.glue.__main__ import main as glue

    own = ["--init", "noise", *OWN, "--model", str(t5), "--epochs", "1", "--train-examples", "64"]
    own += ["--data", "synthetic", "--validation-examples", "16", "--batch-size", "8"]
    code, _, err = here(*own, "--json", main=glue)
    assert code == 0, err
    assert results(tmp_path)["noise"]["noise_strength"] == 0.5


@pytest.fixture
def findable(plugin, monkeypatch):
    """A module that may be imported in this process, and is forgotten when the test ends."""
    monkeypatch.syspath_prepend(plugin.parent)
    yield
    forget()


def forget():
    INITIALIZERS.pop("noise", None), sys.modules.pop("my_noise", None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--init", "noise", *OWN[:3], "-1"], "init noise: strength is -1.0; it must be positive"),
        (["--init", "kaiming", *OWN], "noise_strength is given, but init kaiming has no use for it"),
        (["--init", "noise", "--plugin", "nowhere"], "plugin is 'nowhere': no module named 'nowhere'; put its folder"),
        (["--plugin", "lib/my_noise.py"], "give the name of a module, such as my_module, not of a file"),
        (["--plugin", "my_noise.py"], "give the name of a module, such as my_module, not of a file"),
        (["suite", "--plugin", "nowhere"], "plugin is 'nowhere'"),
        (["compare", "--plugin", "nowhere"], "plugin is 'nowhere'"),
        (["report", "--plugin", "nowhere", "results"], "plugin is 'nowhere'"),
        (["--init", "noise"], "init is 'noise'; allowed are kaiming"),
    ],
)
def test_refused(words, message, findable, capsys):
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_help_has_its_flags(findable, capsys):
    with pytest.raises(SystemExit):
        main(["--plugin", "my_noise", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--noise-strength" in shown and "standard deviation of B (default: 0.01)" in shown


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (
            "my_noise",
            "it was made with --plugin my_noise, and plugin is 'my_noise': no module named 'my_noise'; put",
        ),
        ("json", "its init 'noise' is not registered by its plugin json: name the module that registers it with --"),
        (None, "its init 'noise' is not registered: name the module that registers it with --plugin"),
    ],
)
def test_a_result_whose_initialisation_is_not_registered(plugin, message, vit_run, tmp_path):
    result = vit_run[2]
    config = {**{k: v for k, v in result["config"].items() if not k.startswith("abm_steps")}, "init": "noise"}
    config |= {"noise_strength": 0.5, **({"plugin": plugin} if plugin else {})}
    kept = {key: value for key, value in result.items() if key != "folder"}
    (tmp_path / "result.json").write_text(json.dumps({**kept, "config": config}))
    with pytest.raises(ValueError, match=re.escape(f"result.json: {message}")) as refused:
        HARNESS.kept.read(tmp_path)
    assert "move its folder" not in str(refused.value)


@pytest.fixture
def registered(findable):
    load_plugin("my_noise")


def test_settings_go_to_another_process_with_their_plugin(registered):
    """A worker that has imported nothing yet imports it with the settings."""
    config = make_config(init="noise", noise_strength=0.5)
    assert config.plugin == "my_noise" and config.init_config().strength == 0.5
    data = pickle.dumps(config)
    del INITIALIZERS["noise"], sys.modules["my_noise"]
    assert pickle.loads(data) == config and "noise" in INITIALIZERS


def test_names_of_runs_know_the_setting_and_not_the_place(registered):
    config = make_config(init="noise", noise_strength=0.5)
    assert config.run_name() != make_config(init="noise").run_name()
    assert "plugin" not in config.used() and make_config(**config.to_dict()) == config


@dataclass(frozen=True)
class NoDefault(InitConfig):
    value: "list[int]" = flag((), "")


@dataclass
class Thawed:
    samples: int = 1


def row(name="mine", **options):
    return Initializer(name, "a test", "a test", Needs.NOTHING, print, **options)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (row("pissa"), "init 'pissa' is registered already"),
        (row("my own"), "an initialisation is named 'my own'"),
        (row(config=NoDefault), r"NoDefault.value is of type list\[int\]; a setting is of type bool, .*parse="),
        (row(config=Thawed), "must be a frozen dataclass on InitConfig"),
    ],
)
def test_rows_that_do_not_fit(refused, message):
    with pytest.raises(ValueError, match=message):
        register_initializer(refused)
    assert INITIALIZERS.get(refused.name) is not refused


def test_settings_that_clash():
    @dataclass(frozen=True)
    class Steps(InitConfig):
        steps: int = flag(1, "")

    with pytest.raises(ValueError, match="abm_steps is a setting of init abm: give init mine another prefix"):
        register_initializer(row(config=Steps, prefix="abm"))

    @dataclass(frozen=True)
    class Examples(InitConfig):
        size: int = flag(1, "")

    register_initializer(row(config=Examples, prefix="batch"))
    try:
        with pytest.raises(ValueError, match="batch_size is set in every run: give init mine another prefix"):
            AdapterSettings.settings()
    finally:
        del INITIALIZERS["mine"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "it cannot be imported: ZeroDivisionError: division by zero"),
        ("def", "it cannot be imported: SyntaxError"),
        ("import nowhere", "it cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit(5)", "it cannot be imported: SystemExit: 5"),
    ],
)
def test_a_plugin_that_cannot_be_imported(text, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_broken.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["--plugin", "my_broken", "--init", "noise"]) == 2
    err = capsys.readouterr().err
    assert f"plugin is 'my_broken': {message}" in err and "Traceback" not in err
