"""Instructions made of the standard library's documentation (what does this function do?): real text, no network."""

from __future__ import annotations

import re

from nlp_ext.corpus import functions

SHORTEST, LONGEST = 20, 200  # characters of an answer
_SENTENCE = re.compile(r"(?<=[^.][.!?])\s")  # a space after the end of a sentence; "..." is none


def examples() -> list[dict[str, str]]:
    """Make examples with `instruction` and `output`: a function's signature, and the first sentence about it.

    Sentences that occur twice (inherited documentation) are taken once.
    """
    found: dict[str, str] = {}
    for module, signature, text in functions():
        sentence = _SENTENCE.split(" ".join(text.split("\n\n")[0].split()))[0]
        if SHORTEST <= len(sentence) <= LONGEST and sentence[0].isupper() and sentence[-1] == ".":
            found.setdefault(sentence, f"What does `{signature}` in Python's module `{module}` do?")
    return [{"instruction": asked, "output": answer} for answer, asked in found.items()]
