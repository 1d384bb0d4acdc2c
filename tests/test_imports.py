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
    "nlp_ext": {"timm", "torchvision", "vtab_tasks"},
    "vtab_tasks": {"abm_vision", "nlp_ext", "torch", "timm", "peft"},
}


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        # The data set for PyTorch is the one file that is made for it, and is imported only when it is asked for.
        allowed = {"torch"} if path == ROOT / "vtab_tasks" / "torch.py" else set()
        assert not {name.partition(".")[0] for name in imported(path)} & (FORBIDDEN[folder] - allowed), path


def test_nothing_imports_the_harness_but_itself():
    for path in [*(ROOT / "abm_vision").rglob("*.py"), *(ROOT / "nlp_ext").rglob("*.py")]:
        if path.parent.name != "vtab":
            assert not [name for name in imported(path) if name.startswith("abm_vision.vtab")], path


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


def test_every_public_name_is_there():
    import abm_vision

    assert all(getattr(abm_vision, name) is not None for name in abm_vision.__all__)
    with pytest.raises(AttributeError, match="No abm_vision attribute nothing"):
        abm_vision.nothing  # noqa: B018
