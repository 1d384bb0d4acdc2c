"""The messages of the product, read from its source: what it raises, warns of and prints as an error.

They are grouped into families by `docs/messages.yaml`, which says of each what it means and what to do.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("abm_vision", "nlp_ext", "vtab_tasks")
HOLE = "…"  # stands for what a message is filled in with
FAMILIES = ROOT / "docs" / "messages.yaml"


class Source:
    """One file: its functions, classes and constants by name, and what it says to users."""

    def __init__(self, path: Path) -> None:
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        found = [*ast.walk(self.tree)]
        self.functions = {node.name: node for node in found if isinstance(node, ast.FunctionDef)}
        self.constants = {
            node.targets[0].id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }

    def messages(self) -> Iterator[str]:
        """Every text that is raised, warned of, or printed to stderr."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                yield from self._raised(node.exc)
            elif isinstance(node, ast.Call) and node.args and _speaks(node):
                yield from self._texts(node.args[0])

    def _raised(self, error: ast.expr) -> Iterator[str]:
        """The texts of an exception, which a function may make."""
        if not isinstance(error, ast.Call):
            return
        if isinstance(error.func, ast.Name) and error.func.id in self.functions:
            for value in _returned(self.functions[error.func.id]):
                yield from self._raised(value)
        elif error.args:
            yield from self._texts(error.args[0])

    def _texts(self, node: ast.expr) -> list[str]:
        """All that an expression may be, with `HOLE` for what is only known when it runs."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr():
                return ["".join(str(p.value) if isinstance(p, ast.Constant) else HOLE for p in node.values)]
            case ast.BinOp(op=ast.Add()):
                return [before + after for before in self._texts(node.left) for after in self._texts(node.right)]
            case ast.IfExp():
                return self._texts(node.body) + self._texts(node.orelse)
            case ast.Name(id=name) if name in self.constants:
                return self._texts(self.constants[name])
            case ast.Call(func=ast.Attribute(value=template, attr="format")):
                return [text.replace("{}", HOLE) for text in self._texts(template)]
            case ast.Call(func=ast.Attribute(value=ast.Constant(value="\n"), attr="join"), args=[ast.List(elts=lines)]):
                return [" ".join(self._texts(line)[0] for line in lines)]
            case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                return [text for value in _returned(self.functions[name]) for text in self._texts(value)]
        return [HOLE]


def _speaks(call: ast.Call) -> bool:
    """Whether a call warns, prints to stderr, ends a command, or makes an exception with a text of its own."""
    words = ast.unparse(call.func)
    to_stderr = any(k.arg == "file" and ast.unparse(k.value) == "sys.stderr" for k in call.keywords)
    return words in ("warnings.warn", "super().__init__", "self.error") or (words == "print" and to_stderr)


def _returned(function: ast.FunctionDef) -> list[ast.expr]:
    return [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]


def messages() -> list[str]:
    """Every message with words of its own, sorted; one that only passes on another's text has none."""
    sources = [Source(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    found = {" ".join(text.split()) for source in sources for text in source.messages()}
    return sorted(text for text in found if any(letter.isalpha() for letter in text))


def families() -> list[dict[str, object]]:
    """The families of `docs/messages.yaml`, each with its topic and with the `messages` that it holds."""
    topics = yaml.safe_load(FAMILIES.read_text(encoding="utf-8"))["topics"]
    return [{**family, "topic": topic["topic"]} for topic in topics for family in topic["families"]]
