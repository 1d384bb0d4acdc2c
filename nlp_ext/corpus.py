"""A corpus that every Python has: the documentation strings of its standard library.

The files are parsed, never run, in the order of their names. Tests and installed packages are left out.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SHORTEST = 40  # characters: a shorter text is a heading or a signature


def documentation() -> Iterator[str]:
    """Yield the documentation strings, one paragraph at a time."""
    for _, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                    text = " ".join(paragraph.split())
                    if len(text) >= SHORTEST:
                        yield text


def functions() -> Iterator[tuple[str, str, str]]:
    """Yield module, signature and documentation string of every function and method that has one."""
    for module, tree in _modules():
        for signature, text in _functions(tree, ""):
            yield module, signature, text


def _functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.ClassDef):
            yield from _functions(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (text := ast.get_docstring(node)):
            yield f"{prefix}{node.name}({ast.unparse(node.args)})", text


def _modules() -> Iterator[tuple[str, ast.Module]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(place.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd escapes in old files
                yield ".".join(place.with_suffix("").parts).removesuffix(".__init__"), ast.parse(path.read_bytes())
        except SyntaxError:  # lib2to3 has files that no current Python reads
            continue
