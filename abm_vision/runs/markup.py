"""Escape names and values, which may hold any character, for Markdown, LaTeX and model cards."""

from __future__ import annotations

import json
import re

# Characters with a meaning in Markdown: an underscore at the edge of a word, a bracket where it makes a link, and the
# others everywhere.
_MARKDOWN = re.compile(r"[\\`*<>|&~#$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
_LATEX = {
    ord(character): escaped
    for character, escaped in {
        **{character: f"\\{character}" for character in "{}$&#_%"},
        **{character: f"{{{character}}}" for character in "[]*"},  # after \\ they would be its arguments
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "†": r"$^\dagger$",
        "–": "--",
    }.items()
}


def one_line(text: object) -> str:
    """Remove line ends and tabs; other control characters, which a terminal would obey, become `\\ufffd`."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", "\ufffd", " ".join(str(text).split()))


def markdown(text: object) -> str:
    """Escape text for Markdown by character references, which every dialect reads, in tables and elsewhere."""
    return _MARKDOWN.sub(lambda found: f"&#{ord(found[0])};", one_line(text))


def code(text: object) -> str:
    """Write text as code in Markdown, between more backticks than it has."""
    line = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def quoted(text: object) -> str:
    """Write a string in double quotes, as YAML and Python read it."""
    return json.dumps(str(text), ensure_ascii=False)


def latex(text: object) -> str:
    """Escape text for LaTeX."""
    return one_line(text).translate(_LATEX)
