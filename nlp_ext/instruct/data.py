"""Conversations from the hub or a local file, encoded as tokens with labels on the answers alone."""

from __future__ import annotations

import hashlib
import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from nlp_ext.batches import IGNORED
from nlp_ext.instruct import documentation, synthetic
from nlp_ext.rows import checked_text, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIZARD, SYNTHETIC, DOCUMENTATION = "WizardLMTeam/WizardLM_evol_instruct_70k", "synthetic", "documentation"
MADE = {SYNTHETIC: synthetic.examples, DOCUMENTATION: documentation.examples}  # on this machine
FILES = (".json", ".jsonl", ".parquet")
Conversation = list[dict[str, str]]  # turns with `role` and `content`, as transformers' chat templates take them
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# For a tokeniser without a chat template: instruction and answer under headings, as in Alpaca.
TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
)


def read(source: str) -> list[Conversation]:
    """Read all conversations of a dataset.

    Args:
        source: a name on the hub, "documentation", "synthetic", or a file (.json, .jsonl, .parquet) with the columns
            `instruction`, perhaps `input`, and `output`, or with `messages` (or ShareGPT's `conversations`).

    Raises:
        ValueError: the file is empty or of another kind, and as `conversation`.
        OSError: the file is missing, or the hub cannot be reached.
    """
    if source in MADE:
        return [conversation(row, f"example {k}") for k, row in enumerate(MADE[source]())]
    path = Path(source).expanduser()
    if path.suffix.lower() in FILES:
        return [conversation(row, where) for where, row in read_rows(path)]
    if path.is_file():
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}; files that are read are {', '.join(FILES)}")
    return [conversation(row, f"{source}, example {number}") for number, row in enumerate(_from_hub(source), 1)]


def _from_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # an unreachable hub, whichever layer reports it
        raise OSError(
            f"{name} cannot be read from the hub ({' '.join(str(error).split())}): give a local file "
            f"({', '.join(FILES)}) with --data FILE, or --data {DOCUMENTATION}"
        ) from error


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """Read the turns of a row: optionally the system's, then the user's and the assistant's, alternating.

    Columns `system`, and beside instruction and output `history`, come before them.

    Raises:
        ValueError: the row has other columns, a turn of an unknown role or out of order, an empty answer, or no answer
            at its end.
    """
    name = next((name for name in ("messages", "conversations") if row.get(name)), None)
    if name is not None:
        if not isinstance(row[name], list):
            raise ValueError(f"{where}: {name} is {reprlib.repr(row[name])}; needed is a list of turns")
        found = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(row[name], 1)]
    elif "instruction" in row and "output" in row:
        asked = checked_text(row["instruction"], f"{where}: instruction")
        if row.get("input"):
            asked = f"{asked}\n\n{checked_text(row['input'], f'{where}: input')}"
        answered = checked_text(row["output"], f"{where}: output")
        found = [*_history(row, where), {"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    else:
        raise ValueError(
            f"{where} has the columns {', '.join(row) or 'of nothing'}; needed are instruction and output (and perhaps "
            "input), or messages with role and content"
        )
    if row.get("tools"):
        raise ValueError(f"{where} has tools; conversations with tools cannot be tuned on: leave this example out")
    if row.get("system"):
        if found and found[0]["role"] == "system":
            raise ValueError(f"{where} has a column system, and the system's turn as well: leave one of the two")
        found = [{"role": "system", "content": checked_text(row["system"], f"{where}: system")}, *found]
    _check_order([turn["role"] for turn in found], where)
    for number, turn in enumerate(found, 1):
        if turn["role"] == "assistant" and not turn["content"].strip():
            raise ValueError(f"{where}: the assistant's answer is empty (turn {number}): leave this example out")
    return found


def _history(row: Mapping[str, Any], where: str) -> Conversation:
    """Earlier turns of a row with instruction and output: pairs of what was asked and answered."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError(f"{where}: history is {reprlib.repr(history)}; needed is a list of pairs, [asked, answered]")
    texts = [checked_text(text, f"{where}: history") for pair in history for text in pair]
    return [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]


def _check_order(roles: Sequence[str], where: str) -> None:
    first = int(roles[0] == "system")
    for number, role in enumerate(roles[first:], first):
        expected = "assistant" if (number - first) % 2 else "user"
        if role != expected:
            raise ValueError(
                f"{where}, turn {number + 1}, is the {role}'s; the {expected}'s comes there (turns are perhaps the "
                "system's, then the user's and the assistant's, one after the other)"
            )
    if roles[-1] != "assistant":
        raise ValueError(f"{where} ends without an answer of the assistant")


def _turn(turn: object, where: str) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{where}, is {reprlib.repr(turn)}; needed are role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{where}, has the role {reprlib.repr(role)}; allowed are {', '.join(ROLES)}")
    if calls := next((name for name in ("tool_calls", "function_call") if turn.get(name)), None):
        raise ValueError(f"{where}, has {calls}; conversations with tools cannot be tuned on: leave this example out")
    return {"role": ROLES[role], "content": checked_text(content, f"{where}: content")}


def digest(conversations: Sequence[Conversation]) -> str:
    """Hash all turns."""
    return hashlib.sha256(json.dumps(conversations, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Conversations as rows of input_ids and labels; `cut` rows lost their end, `left_out` their whole answer."""

    conversations: int
    rows: list[dict[str, list[int]]]
    cut: int
    left_out: int

    def record(self, source: str) -> dict[str, Any]:
        """Return the counts for a result."""
        counts = {"sequences": len(self.rows), "cut": self.cut, "left_out": self.left_out}
        return {"source": source, "conversations": self.conversations, **counts}


def encode_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], length: int) -> Tokens:
    """Encode all conversations, none longer than `length` tokens.

    Raises:
        ValueError: every answer lies beyond `length`.
    """
    rows = [row for one in conversations for row in encode(tokenizer, one)]
    shortened = [{k: ids[:length] for k, ids in row.items()} for row in rows]
    kept = [row for row in shortened if any(label != IGNORED for label in row["labels"])]
    if not kept:
        raise ValueError(f"every answer lies beyond token {length}: raise --length")
    return Tokens(len(conversations), kept, sum(len(row["input_ids"]) > length for row in rows), len(rows) - len(kept))


def encode(tokenizer: PreTrainedTokenizerBase, turns: Conversation) -> list[dict[str, list[int]]]:
    """Encode a conversation as input_ids and labels, which are -100 except in the assistant's turns and their ends.

    It is one row, unless the template writes an answer differently once more turns follow (as for models that think):
    then every answer has its own row, which ends with it, as the model will see it.

    Raises:
        ValueError: the template does not accept the conversation, or leaves an answer out.
    """
    answers = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    ids = _ids(tokenizer, turns)
    spans = [_span(tokenizer, turns, k, ids) for k in answers]
    if all(start < end for start, end in spans):
        return [_labelled(ids, spans)]
    rows = []
    for k in answers:
        ids = _ids(tokenizer, turns[: k + 1])
        start, end = _span(tokenizer, turns, k, ids)
        if start >= end:
            raise ValueError("the model's chat template leaves the assistant's answers out: another one is needed")
        rows.append(_labelled(ids, [(start, end)]))
    return rows


def _span(tokenizer: PreTrainedTokenizerBase, turns: Conversation, k: int, ids: Sequence[int]) -> tuple[int, int]:
    """First and last position (exclusive) of the answer of turn k in `ids`."""
    start = _common(ids, _ids(tokenizer, turns[:k], answer_next=True))
    return start, _common(ids, _ids(tokenizer, turns[: k + 1]))


def _labelled(ids: list[int], spans: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Find the special token that the chat template writes after an answer; None if there is none."""
    question, given = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    begun = _ids(tokenizer, [question], answer_next=True)
    ids = _ids(tokenizer, [question, given])
    specials = set(tokenizer.all_special_ids)
    words = tokenizer("b", add_special_tokens=False).input_ids
    after = ids[_common(ids, begun) :]
    rest = after[max((k + 1 for k, token in enumerate(after) if token in words), default=0) :]
    return next((token for token in rest if token in specials), None)


def _ids(tokenizer: PreTrainedTokenizerBase, turns: Conversation, answer_next: bool = False) -> list[int]:
    return tokenizer(prompt(tokenizer, turns, answer_next), add_special_tokens=False, verbose=False).input_ids


def prompt(tokenizer: PreTrainedTokenizerBase, turns: Conversation, answer_next: bool = True) -> str:
    """Write a conversation by the tokeniser's own chat template, or by `TEMPLATE`."""
    template = tokenizer.chat_template or TEMPLATE
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=answer_next
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns) or "no turn"
        raise ValueError(f"the model's chat template takes no conversation of {roles} ({error})") from error


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix: a template may write the same turns differently when more follow."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
