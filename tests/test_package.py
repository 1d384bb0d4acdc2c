"""What is handed on: the source distribution is the whole checkout, and its metadata say what it is."""

import email
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import abm_vision

ROOT = Path(__file__).parent.parent
BUILD = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
GRAFTED = (".ci", "benchmarks", "docs", "examples", "notebooks", "tests")
PACKAGES = ("abm_vision", "nlp_ext", "vtab_tasks")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Files of the source distribution, by their path, as a reader of each."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sdist")
    for name in (*GRAFTED, *PACKAGES):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for path in filter(Path.is_file, ROOT.iterdir()):
        shutil.copy(path, source)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.iterdir()
    with tarfile.open(path) as archive:
        return {m.name.partition("/")[2]: archive.extractfile(m).read() for m in archive if m.isfile()}


@pytest.mark.slow
def test_the_source_distribution_is_the_checkout(sdist):
    found = {p.relative_to(ROOT) for name in (*GRAFTED, *PACKAGES) for p in (ROOT / name).rglob("*") if p.is_file()}
    wanted = {p.as_posix() for p in found if "__pycache__" not in p.parts and not p.name.startswith("._")}
    assert {"tests/conftest.py", "examples/plain_loop.py", "docs/concepts.md", "tests/peft/run.py"} <= wanted
    assert wanted <= set(sdist), sorted(wanted - set(sdist))
    assert {"mkdocs.yml", "README.md", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.cfg"} <= set(sdist)
    assert not [name for name in sdist if name.endswith(".pyc")]


@pytest.mark.slow
def test_metadata(sdist):
    found = email.message_from_bytes(sdist["PKG-INFO"])
    assert found["Version"] == abm_vision.__version__ and found["License"] == "Apache-2.0"
    assert found["Author"] and "https://arxiv.org/abs/2511.19145" in " ".join(found.get_all("Project-URL"))
    assert {"Typing :: Typed", "Programming Language :: Python :: 3 :: Only"} <= set(found.get_all("Classifier"))
    lowest = found["Requires-Python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {lowest}" in found.get_all("Classifier")


def test_the_version_is_that_of_the_stub():
    """Type checkers know it too."""
    assert "__version__: str" in (ROOT / "abm_vision" / "__init__.pyi").read_text()
