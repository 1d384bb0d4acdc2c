"""The commit that is recorded with a result."""

import shutil
import subprocess
from pathlib import Path

import pytest

from abm_vision.runs import provenance

ROOT = Path(__file__).parent.parent


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """A checkout of somebody else's, with a copy of the module in an environment inside it."""
    (tmp_path / "site-packages").mkdir()
    shutil.copy(provenance.__file__, tmp_path / "site-packages")
    (tmp_path / "their.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "their.py")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "theirs")
    monkeypatch.setattr(provenance, "HERE", tmp_path / "site-packages")
    return tmp_path


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_commit_of_the_checkout_is_recorded():
    assert provenance.git_commit()["id"] == git(ROOT, "rev-parse", "HEAD")


def test_a_checkout_around_an_installed_package_is_not_its_own(foreign):
    assert provenance.git_commit() is None


def test_changed_files_are_recorded(foreign):
    git(foreign, "add", "site-packages/provenance.py")
    assert provenance.git_commit() == {"id": git(foreign, "rev-parse", "HEAD"), "modified": True}
