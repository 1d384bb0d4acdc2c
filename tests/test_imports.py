"""One direction of imports, and nothing heavy that nobody asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# folder -> packages that nothing in it may import, anywhere in its files
FORBIDDEN = {
    "abm_vision/abm": {"timm", "torchvision", "transformers", "datasets", "vtab_tasks", "nlp_ext"},
    "abm_vision/runs": {"timm", "torchvision", "transformers", "datasets", "vtab_tasks", "nlp_ext"},
    "abm_vision/images": {"transformers", "nlp_ext"},
    "abm_vision/tune": {"transformers", "datasets", "nlp_ext"},
    "abm_vision/analysis": {"torch", "peft", "timm", "torchvision", "transformers", "datasets", "nlp_ext"},
    "nlp_ext": {"timm", "torchvision", "vtab_tasks"},
    "vtab_tasks": {"abm_vision", "nlp_ext", "torch", "timm", "peft"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def against(root, folder):
    """File to the forbidden packages that it imports, of the files below a folder."""
    files = list((root / folder).rglob("*.py"))
    assert files
    found = {}
    for path in files:
        # The dataset for PyTorch is the one file that is made for it, and is imported only when it is asked for.
        allowed = {"torch"} if path == root / "vtab_tasks" / "torch.py" else set()
        found[path] = {name.partition(".")[0] for name in imported(path)} & (FORBIDDEN[folder] - allowed)
    return {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder):
    assert not against(ROOT, folder)


@pytest.mark.parametrize(
    "line",
    [
        "import timm",
        "import timm.data as d",
        "from timm.layers import DropPath",
        "def f():\n    import timm",
        "import os, timm",
    ],
)
def test_a_forbidden_import_is_found(tmp_path, line):
    for name, text in {"good.py": "import torch\nfrom .timm import x\n", "sub/bad.py": line}.items():
        path = tmp_path / "abm_vision" / "abm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert against(tmp_path, "abm_vision/abm") == {tmp_path / "abm_vision" / "abm" / "sub" / "bad.py": {"timm"}}


def test_no_test_imports_another():
    """What two files need is in helpers.py and conftest.py."""
    files = list((ROOT / "tests").glob("*.py"))
    assert not {path: names for path in files if (names := [n for n in imported(path) if n.startswith("test_")])}


def test_nothing_imports_a_harness_but_itself():
    for path in [*(ROOT / "abm_vision").rglob("*.py"), *(ROOT / "nlp_ext").rglob("*.py")]:
        for harness in {"vtab", "tune"} - set(path.parts):
            assert not [name for name in imported(path) if name.startswith(f"abm_vision.{harness}")], path


def test_an_analysis_reads_runs_and_not_the_other_way():
    """But for the commands, which are above both."""
    for path in [ROOT / "abm_vision" / "drawing.py", *(ROOT / "abm_vision" / "runs").rglob("*.py")]:
        if "commands" not in path.parts:
            assert not [name for name in imported(path) if name.startswith("abm_vision.analysis")], path


def test_importing_loads_nothing_heavy_until_it_is_used():
    code = (
        "import sys, abm_vision as a, nlp_ext as n\n"
        "heavy = {'torch', 'peft', 'timm', 'transformers', 'matplotlib', 'numpy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "n.T5, a.VIT, a.add_lora\n"
        "assert not {'timm', 'matplotlib'} & set(sys.modules)\n"
        "a.create_backbone; assert 'timm' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ANSWERED = {  # program to what it answers at once, in a process for each
    "abm_vision.vtab": [
        *("--help", "--bogus", "--task nothing", "--epochs none"),
        *(f"{c} --help" for c in ("suite", "compare", "report", "predict", "evaluate", "prepare", "list")),
        *("export --help", "export --to nothing", "merge --help"),
        *(
            "suite --bogus",
            "compare --lr",
            "compare --init nothing",
            "suite --tasks nothing",
            "suite --init nothing",
            "suite --grid nothing",
        ),
    ],
    "abm_vision.tune": [
        *("--help", "--bogus", "--augment much", "--epochs none", "--validation 1"),
        *(f"{c} --help" for c in ("suite", "compare", "report", "predict", "evaluate", "export", "merge")),
    ],
    "nlp_ext.glue": [
        *("--help", "--bogus", "--task nothing", "suite --help", "compare --help", "report --help"),
        *("suite --tasks nothing", "suite --init nothing"),
    ],
    "nlp_ext.instruct": [
        *("--help", "--bogus", "--base none", "chat --help", "mt-bench --bogus", "suite --help"),
        "suite --init nothing",
    ],
}


@pytest.mark.parametrize("program", ANSWERED)
def test_help_and_a_wrong_flag_or_task_load_no_heavy_library(program):
    code = (
        "import importlib, sys\n"
        "main = importlib.import_module(sys.argv[1] + '.__main__').main\n"
        "for line in sys.argv[2:]:\n"
        "    try: code = main(line.split())\n"
        "    except SystemExit as stop: code = stop.code\n"
        "    assert code == (0 if '--help' in line else 2), (line, code)\n"
        "    heavy = {'torch', 'peft', 'timm', 'transformers', 'datasets', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "    assert not heavy, (line, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, program, *ANSWERED[program]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_settings_are_made_without_torch():
    """So that a command's help and a wrong setting are answered at once."""
    code = (
        "import sys, abm_vision.initializers, abm_vision.abm.settings\n"
        "from abm_vision.tune.config import TuneConfig\n"
        "from abm_vision.vtab.config import RunConfig\n"
        "from nlp_ext.glue.config import GlueConfig\n"
        "from nlp_ext.instruct.config import InstructConfig\n"
        "made = [kind.make(device='cpu').run_name() for kind in (RunConfig, TuneConfig, GlueConfig, InstructConfig)]\n"
        "heavy = {'torch', 'peft', 'timm', 'transformers', 'matplotlib', 'datasets'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_analysis_loads_no_torch_and_draws_only_figures():
    code = (
        "import sys, abm_vision.analysis.compare, abm_vision.analysis.report, abm_vision.vtab.view, nlp_ext.glue.view\n"
        "import abm_vision.tune.view\n"
        "heavy = {'torch', 'peft', 'timm', 'transformers', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_packages_are_attributes():
    code = (
        "import abm_vision as a, nlp_ext as n\n"
        "packages = [a.abm, a.analysis, a.initializers, a.runs, a.vtab, n.glue, n.instruct]\n"
        "assert a.vtab.RunConfig and n.glue.GlueConfig\n"
        "print(*(p.__name__ for p in packages))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = "abm_vision.abm abm_vision.analysis abm_vision.initializers abm_vision.runs abm_vision.vtab"
    assert done.stdout.split() == [*names.split(), "nlp_ext.glue", "nlp_ext.instruct"], done.stderr


def test_every_public_name_is_there():
    import abm_vision

    assert all(getattr(abm_vision, name) is not None for name in abm_vision.__all__)
    with pytest.raises(AttributeError, match="No abm_vision attribute nothing"):
        abm_vision.nothing  # noqa: B018
