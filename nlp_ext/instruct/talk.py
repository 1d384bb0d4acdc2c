"""Chat with a tuned model, and let it answer MT-Bench's questions."""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

from abm_vision.abm.bars import progress
from abm_vision.abm.files import write_atomically
from abm_vision.abm.loading import load_adapter, read_adapter_config, read_settings
from abm_vision.abm.saving import ABM_FILE
from abm_vision.runs.folder import adapter_folder
from abm_vision.runs.records import checked
from nlp_ext.instruct.answer import answer
from nlp_ext.instruct.data import Conversation
from nlp_ext.models import load_model
from nlp_ext.rows import checked_text, json_rows

# Temperature by category of a question (Zheng et al., arXiv:2306.05685), 0.7 for all others.
TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER = 0.7


class Run(BaseModel):
    """Settings of the run that saved an adapter."""

    model_config = ConfigDict(strict=True)
    model: str | None = None
    base: Literal["fp32", "bf16", "4bit"] = "fp32"


class Base(BaseModel):
    """The weights that an adapter was tuned on."""

    model_config = ConfigDict(strict=True)
    sha256: str | None


class Trained(BaseModel):
    """The entries of `abm.json` about a run; the others are about the adapter itself."""

    model_config = ConfigDict(strict=True)
    run: Run = Run()
    weights: Base | None = None


class Assistant:
    """A base model, with a saved adapter or alone.

    Args:
        adapter: a run's folder, or the adapter's own; None for the base model alone.
        model: the base model; None takes the run's.
        device: device to run on.
        new_tokens: length of the longest answer in tokens.

    Raises:
        FileNotFoundError, ValueError, OSError: nothing is given, there is no adapter, no base is named, or the base
            cannot be loaded.
    """

    def __init__(self, adapter: str | Path | None, model: str | None, device: torch.device, new_tokens: int) -> None:
        if adapter is not None:
            self.model, self.tokenizer = _adapted(adapter, model, device)
        elif model is not None:
            base, self.tokenizer, _ = load_model(model, AutoModelForCausalLM, dtype="auto")
            self.model: PreTrainedModel | PeftModel = base.to(device)
        else:
            raise ValueError(
                "neither an adapter nor a model is given: --adapter DIR (a run's folder, or the adapter's own), or "
                "--model NAME for a base model alone"
            )
        self.new_tokens = new_tokens

    def reply(self, turns: Conversation, temperature: float = 0.0) -> str:
        """Generate the next turn."""
        return answer(self.model, self.tokenizer, turns, self.new_tokens, temperature)


def _adapted(adapter: str | Path, model: str | None, device: torch.device) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The adapter on its base, and the tokeniser that it was trained with."""
    folder = adapter_folder(adapter)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {adapter}: give that of a finished run, or of an adapter")
    read_adapter_config(folder)  # before a model is asked for
    settings = read_settings(folder) if (folder / ABM_FILE).is_file() else {}
    remedy = "it is damaged, or was not written by a run: give the model with --model, or another adapter"
    checked(settings, Trained, str(folder / ABM_FILE), remedy)
    recorded = settings.get("run", {})
    name = model or recorded.get("model")
    if name is None:
        raise ValueError(f"{folder} does not say which model it adapts: give it with --model")
    # A 4-bit base of the training is loaded in bfloat16 here.
    dtype = torch.float32 if recorded.get("base", "fp32") == "fp32" else torch.bfloat16
    base, tokenizer, weights = load_model(name, AutoModelForCausalLM, dtype=dtype)
    tuned_on = settings["weights"]["sha256"] if "weights" in settings else None
    if model is None and tuned_on not in (None, weights.sha256):
        raise ValueError(
            f"{folder} was tuned on weights of sha256 {tuned_on}, {name} has {weights.sha256} now; --model {name} "
            "uses them anyway"
        )
    if (folder / TOKENIZER_CONFIG_FILE).is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return load_adapter(base.to(device), folder).eval(), tokenizer


def mt_bench(assistant: Assistant, questions: Path, out: Path, model_id: str, seed: int, show_bar: bool) -> Path:
    """Answer MT-Bench's questions, both turns, in the format of FastChat's judge.

    Args:
        assistant: the model that answers.
        questions: FastChat's `question.jsonl`: question_id, category and turns.
        out: folder; the answers are written to OUT/model_answer/MODEL_ID.jsonl.
        model_id: the name that the judge shows.
        seed: seed of the sampled answers.
        show_bar: show a bar over the questions.

    Returns:
        The file of the answers.

    Raises:
        FileNotFoundError, ValueError: there are no questions, or they have another form, or the name is no file name.
        CannotWrite: the answers cannot be written.
    """
    if Path(model_id).name != model_id or not model_id.strip("."):
        raise ValueError(f"name is {model_id!r}; it names a file, so it has no / in it")
    lines = []
    for question in progress(list(_questions(questions)), "MT-Bench", show=show_bar):
        torch.manual_seed(seed)
        temperature = TEMPERATURES.get(question.get("category"), OTHER)
        turns: Conversation = []
        for text in question["turns"]:
            turns.append({"role": "user", "content": text})
            turns.append({"role": "assistant", "content": assistant.reply(turns, temperature)})
        answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
        lines.append(
            {
                "question_id": question["question_id"],
                "answer_id": uuid.uuid4().hex,
                "model_id": model_id,
                "choices": [{"index": 0, "turns": answers}],
                "tstamp": time.time(),
            }
        )
    path = out / "model_answer" / f"{model_id}.jsonl"
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda beside: beside.write_text(text, encoding="utf-8"))
    return path


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: it is question.jsonl of FastChat's MT-Bench")
    known: dict[int | str, str] = {}
    for where, question in json_rows(path):
        if not isinstance(question, dict) or not isinstance(question.get("question_id"), (int, str)):
            raise ValueError(f"{where}: a question has question_id (a number or a text) and turns")
        turns, number = question.get("turns"), question["question_id"]
        if not isinstance(turns, list) or not turns:
            raise ValueError(f"{where}: turns is {reprlib.repr(turns)}; needed is a list of texts")
        for turn in turns:
            if not checked_text(turn, f"{where}: a turn").strip():
                raise ValueError(f"{where}: a turn is empty")
        if not isinstance(question.get("category"), str | None):
            raise ValueError(f"{where}: category is {reprlib.repr(question['category'])}; a text is needed")
        if number in known:
            raise ValueError(f"{where}: question_id {number} is in {known[number]} too")
        known[number] = where
        yield question
