"""Examples in docstrings do what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [path for name in ("abm_vision", "nlp_ext", "vtab_tasks") for path in sorted((ROOT / name).rglob("*.py"))]
MODULES = [path.relative_to(ROOT) for path in FILES if ">>> " in path.read_text()]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_examples(path):
    name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted and not found.failed
