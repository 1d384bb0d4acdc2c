"""Hooks of mkdocs: formulas as MathML, links to notebooks."""

from __future__ import annotations

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

CODE = re.compile(r"<(pre|code|script|style)\b.*?</\1>", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.DOTALL)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lead to the pages of notebooks; in a clone and on GitHub, which follows no symbolic link, to their files."""
    return markdown.replace("](../notebooks/", "](notebooks/")


def on_page_content(html: str, **_: Any) -> str:
    """Convert LaTeX between dollars, in pages and notebooks, to MathML, which browsers show without a script."""
    text, end = [], 0
    for code in CODE.finditer(html):
        text += [FORMULA.sub(_formula, html[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*text, FORMULA.sub(_formula, html[end:])])


def _formula(found: re.Match[str]) -> str:
    return convert(unescape(found[1] or found[2]), display="block" if found[1] else "inline")
