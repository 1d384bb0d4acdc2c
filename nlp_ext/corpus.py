"""A corpus that every Python has: the documentation strings of its standard library."""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path


def documentation() -> Iterator[str]:
    """Yield the documentation strings of the standard library, one paragraph at a time, in the order of its files.

    The files are parsed, never run. Tests and installed packages are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts):
            continue
        yield from _paragraphs(path)


def _paragraphs(path: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in old files
            tree = ast.parse(path.read_bytes())
    except SyntaxError:  # lib2to3 has files that no current Python reads
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                text = " ".join(paragraph.split())
                if len(text) >= SHORTEST:
                    yield text


SHORTEST = 40  # characters: a shorter text is a heading or a signature
