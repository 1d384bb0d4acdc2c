"""Conversations from the hub or a local file, and as tokens with labels on the answers alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from nlp_ext.batches import IGNORED
from nlp_ext.instruct import synthetic

WIZARD, SYNTHETIC = "WizardLMTeam/WizardLM_evol_instruct_70k", "synthetic"
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
Conversation = list[dict[str, str]]  # turns with `role` and `content`, as transformers' chat templates take them
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

# For a model whose tokeniser has no template of its own: instruction and answer under headings, as in Alpaca's.
TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% elif m['role'] == 'user' %}{{ '### Instruction:\n' + m['content'] + '\n\n### Response:\n' }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
)


def read(source: str) -> list[Conversation]:
    """All conversations of a data set.

    Args:
        source: a name on the hub, "synthetic", or a file (.json, .jsonl, .parquet) with the columns `instruction`,
            perhaps `input`, and `output`, or with `messages` (or ShareGPT's `conversations`).

    Raises:
        ValueError: an empty file, other columns, or a conversation without an answer.
        OSError: the file is not there, or the hub cannot be reached.
    """
    if source == SYNTHETIC:
        return [conversation(row, f"example {k}") for k, row in enumerate(synthetic.examples())]
    path = Path(source).expanduser()
    rows = _from_file(path) if path.suffix in READERS else _from_hub(source)
    return [conversation(row, f"{source}, example {number}") for number, row in enumerate(rows, 1)]


def _from_file(path: Path) -> Any:
    import datasets

    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty")
    try:
        rows = datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train", keep_in_memory=True)
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        cause = error.__cause__ or error
        raise ValueError(f"{path} cannot be read as {READERS[path.suffix]} ({' '.join(str(cause).split())})") from error
    if not len(rows):
        raise ValueError(f"{path} has no examples")
    return rows


def _from_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, split="train")
    except (OSError, ValueError) as error:  # a hub that is not reached, whatever the layer that notices
        raise OSError(
            f"{name} cannot be read from the hub ({' '.join(str(error).split())}): give a local file "
            f"({', '.join(READERS)}) with --data FILE, or --data {SYNTHETIC}"
        ) from error


def conversation(row: Mapping[str, Any], where: str) -> Conversation:
    """The turns that a row says.

    Raises:
        ValueError: the row has other columns, a turn of an unknown role, or no answer at its end.
    """
    turns = row.get("messages") or row.get("conversations")
    if turns:
        found = [_turn(turn, where) for turn in turns]
    elif isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        asked = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
        found = [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]
    else:
        raise ValueError(
            f"{where} has the columns {', '.join(row)}; needed are instruction and output (and perhaps input), or "
            "messages with role and content"
        )
    if found[-1]["role"] != "assistant" or not found[-1]["content"].strip():
        raise ValueError(f"{where} ends without an answer of the assistant")
    return found


def _turn(turn: Mapping[str, Any], where: str) -> dict[str, str]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES or not isinstance(content, str):
        raise ValueError(f"{where} has a turn {dict(turn)}; needed are role ({', '.join(ROLES)}) and content")
    return {"role": ROLES[role], "content": content}


def digest(conversations: Sequence[Conversation]) -> str:
    """A hash of all turns."""
    return hashlib.sha256(json.dumps(conversations, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Tokens:
    """Conversations as rows of input_ids and labels; `cut` rows lost their end, `left_out` their whole answer."""

    conversations: int
    rows: list[dict[str, list[int]]]
    cut: int
    left_out: int

    def record(self, source: str) -> dict[str, Any]:
        """What a result says of them."""
        counts = {"sequences": len(self.rows), "cut": self.cut, "left_out": self.left_out}
        return {"source": source, "conversations": self.conversations, **counts}


def encode_all(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Conversation], length: int) -> Tokens:
    """Tokens of all conversations, none longer than `length`.

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
    """A conversation as input_ids, and labels that are -100 but for the assistant's turns and their ends.

    It is one row, unless the template writes an answer differently once more turns follow (models that think do): then
    every answer has a row of its own, which ends with it, as the model will see it.

    Raises:
        ValueError: the template does not take the conversation, or leaves an answer out.
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
    """Where in `ids` the answer of turn k begins and ends."""
    start = _common(ids, _ids(tokenizer, turns[:k], answer_next=True))
    return start, _common(ids, _ids(tokenizer, turns[: k + 1]))


def _labelled(ids: list[int], spans: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "labels": labels}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that the chat template puts behind an answer, if it has one: with it an answer is whole."""
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
    """The text of a conversation by the tokeniser's own chat template, or by `TEMPLATE`."""
    template = tokenizer.chat_template or TEMPLATE
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=answer_next
        )
    except (TemplateError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in turns) or "no turn"
        raise ValueError(f"the model's chat template takes no conversation of {roles} ({error})") from error


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with: a template may write the same turns differently when more follow."""
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
