"""GLUE for the spine (`abm_vision.runs.run`): its examples and models, its training and its scores."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from abm_vision.abm.bars import progress as progress_bar
from abm_vision.abm.files import write_atomically
from abm_vision.abm.loading import load_adapter
from abm_vision.runs.content import Origin, version
from abm_vision.runs.device import autocast
from abm_vision.runs.folder import ADAPTER
from abm_vision.runs.harness import Checkpoint, Harness, Run, Session, SessionOptions, silent
from abm_vision.runs.order import shuffled
from abm_vision.runs.run import run as run_spine
from nlp_ext import trainer
from nlp_ext.glue import data
from nlp_ext.glue.config import GlueConfig
from nlp_ext.glue.results import KEPT, model_card, summary
from nlp_ext.glue.scores import score as metrics
from nlp_ext.glue.server import server_file
from nlp_ext.glue.tasks import INVALID, GlueTask, get_task
from nlp_ext.models import check_model, load_model
from nlp_ext.quiet import only_our_own_words
from nlp_ext.ranks import text_device
from nlp_ext.textrun import Row, TextRun, adapt, adapter_settings, save_tokenizer, split_content, text_origin
from nlp_ext.trainer import Progress, training_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

SERVER = "server"
SHOWN = 5  # texts that are no label, kept in a result


def run(config: GlueConfig, out: str | Path = "results", **session: Unpack[SessionOptions]) -> dict[str, Any]:
    """Adapt a T5 to one task of GLUE, score its validation set, and write everything under `out`.

    With `extras=("server",)` predictions for the test splits are written in the format of the GLUE server.

    `out` is the parent of the run's folder; `session` are the other fields of `abm_vision.runs.harness.Session`, such
    as rerun, diagnose, say and log. What is returned and raised is that of `abm_vision.runs.run.run`.
    """
    return run_spine(HARNESS, config, Session(out, **session))


# ------------------------------------------------------------------------------------------ data, weights and adapter


@dataclass
class Split:
    """Examples as tokens: `rows` with input_ids and labels, and what was cut."""

    name: str
    examples: Dataset
    rows: list[Row]
    cut: int

    def record(self, source: str) -> dict[str, Any]:
        """What a result says of it; the hash is of all its texts and labels."""
        digest = data.digest(self.examples)
        return {"split": self.name, "source": source, "examples": len(self.rows), "cut": self.cut, "sha256": digest}


@dataclass(kw_only=True)
class GlueRun(TextRun):
    """A run of GLUE with its task and what is scored."""

    config: GlueConfig
    task: GlueTask
    validation: list[Split]


def prepare(run: Run) -> GlueRun:
    """Examples, model, tokeniser and adapter.

    Raises:
        ValueError, OSError: of the data, the model, or the adapter, each with one message.
    """
    config, say = run.config, run.session.say
    task = get_task(config.task)
    with run.stage("weights"):
        check_model(config.model, AutoModelForSeq2SeqLM, say)
    with run.stage("data"):  # before the weights, which take longer: a mistake in a file is reported at once
        examples = {split: read_split(config, split) for split in ("train", *task.validation)}
    with run.stage("weights"):
        model, tokenizer, weights = load_model(
            config.model, AutoModelForSeq2SeqLM, show_progress_bar=not run.session.quiet, dtype=torch.float32
        )
        say(f"weights   {weights}")
    with run.stage("data"):
        train, *validation = (encode_split(config, split, found, tokenizer) for split, found in examples.items())
        count = " and ".join(f"{len(split.rows)} of {split.name}" for split in validation)
        cut = f"; {train.cut} cut at {config.source_tokens} tokens (--source-tokens)" if train.cut else ""
        say(f"data      {config.data_source}: {len(train.rows)} training examples{cut}, {count}")
    record = {
        "train": train.record(config.data_source),
        "validation": [split.record(config.data_source) for split in validation],
    }
    content = [
        partial(split_content, split["split"], split["sha256"]) for split in (record["train"], *record["validation"])
    ]
    return adapt(
        GlueRun,
        run,
        model.to(run.device),
        text_origin(config, content, _encoding, config.task),
        scored=[row for split in validation for row in split.rows],
        rows=train.rows,
        weights=weights,
        tokenizer=tokenizer,
        data=record,
        task=task,
        validation=validation,
    )


def origin_parts(config: GlueConfig) -> list[partial[Origin]]:
    """What gives the content that a run of this configuration would be made of now, but for its tokens."""
    return text_origin(config, [partial(_content, *asked) for asked in _splits(config)], _encoding, config.task)


def data_parts(config: GlueConfig) -> list[partial[Any]]:
    """What reads the examples of a run of this configuration."""
    return [partial(_examples, *asked) for asked in _splits(config)]


def _splits(config: GlueConfig) -> list[tuple[Any, ...]]:
    return [_asked(config, split) for split in ("train", *get_task(config.task).validation)]


def _content(task: str, split: str, source: str, most: int, seed: int) -> Origin:
    return split_content(split, data.digest(_examples(task, split, source, most, seed)))


def _encoding(task: str) -> str:
    return version(encode, get_task(task))


def read_split(config: GlueConfig, name: str) -> Dataset:
    """The examples of a split that the configuration asks for.

    A training set that is not taken whole is the first part of the shuffled one; of validation it is the first part.
    Test splits are always whole, and have no labels.
    """
    return _examples(*_asked(config, name))


def encode_split(config: GlueConfig, name: str, examples: Dataset, tokenizer: PreTrainedTokenizerBase) -> Split:
    """The examples of a split as tokens."""
    rows, cut = encode(get_task(config.task), examples, tokenizer, config.source_tokens, not name.startswith("test"))
    return Split(name, examples, rows, cut)


def _asked(config: GlueConfig, split: str) -> tuple[str, str, str, int, int]:
    """The arguments of `_examples`, equal for all runs on the same examples."""
    most = {"train": config.train_examples, "validation": config.validation_examples}.get(split.partition("_")[0], 0)
    return config.task, split, config.data_source, most, config.seed if split == "train" else 0


def _examples(task: str, split: str, source: str, most: int, seed: int) -> Dataset:
    examples = data.read(get_task(task), split, source)
    if split == "train":
        (order,) = shuffled(len(examples), len(examples), seed, 0)
        return examples.select(order[: most or None].tolist())
    return examples.select(range(most)) if 0 < most < len(examples) else examples


def encode(
    task: GlueTask, examples: Dataset, tokenizer: PreTrainedTokenizerBase, source_tokens: int, labelled: bool
) -> tuple[list[Row], int]:
    """Examples as input_ids and, if there are any, labels; and how many inputs were cut."""
    sources = tokenizer([task.source(example) for example in examples], verbose=False).input_ids
    cut = sum(len(ids) > source_tokens for ids in sources)
    rows = [{"input_ids": shortened(ids, source_tokens)} for ids in sources]
    if labelled:
        targets = tokenizer([task.target(label) for label in examples["label"]]).input_ids
        rows = [{**row, "labels": target} for row, target in zip(rows, targets, strict=True)]
    return rows, cut


def shortened(ids: list[int], length: int) -> list[int]:
    """The first tokens and the last, which is the end of the text."""
    return ids if len(ids) <= length else [*ids[: length - 1], ids[-1]]


def target_length(task: GlueTask, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest answer, its end included."""
    answers = task.labels or tuple(f"{k / 5:.1f}" for k in range(26))
    return max(len(ids) for ids in tokenizer(list(answers)).input_ids)


# ---------------------------------------------------------------------------------------------------- train and score


def train(run: GlueRun, notes: dict[str, Any], checkpoint: Checkpoint | None) -> Progress:
    """Train to the end, with transformers' Trainer."""
    own = Trainer(
        model=run.model,
        args=training_arguments(TrainingArguments, run),
        data_collator=DataCollatorForSeq2Seq(run.tokenizer),
        train_dataset=Dataset.from_list(run.rows),
        processing_class=run.tokenizer,
    )
    return trainer.train(own, run, notes, checkpoint)


def score(run: GlueRun, progress: Progress) -> dict[str, Any]:
    """The metrics of every validation split."""
    with run.stage("validation"):
        scores = {split.name: _score(run, split) for split in run.validation}
    return {**run.recorded(), "steps_per_epoch": progress.steps_per_epoch, "scores": scores}


def _score(run: GlueRun, split: Split) -> dict[str, Any]:
    texts = _texts(run, split)
    predictions = [run.task.read(text) for text in texts]
    scores = metrics(run.task, predictions, split.examples["label"])
    invalid = sorted({text for text, label in zip(texts, predictions, strict=True) if label is INVALID})
    return {**scores, "count": len(texts), "invalid_texts": invalid[:SHOWN]}


@torch.no_grad()
def _texts(run: GlueRun, split: Split) -> list[str]:
    """What the model writes for every example, greedily."""
    run.model.eval()
    size, length = run.config.batch_size, target_length(run.task, run.tokenizer)
    rows = [{"input_ids": row["input_ids"]} for row in split.rows]
    texts: list[str] = []
    for first in progress_bar(range(0, len(rows), size), split.name, show=not run.session.quiet):
        with autocast(run.device, run.precision):
            tokens = run.model.generate(
                **run.batch(rows[first : first + size]), max_new_tokens=length, do_sample=False, num_beams=1
            )
        texts += run.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def write_predictions(run: Run) -> None:
    """Predictions of a finished run for the test splits, in the format of the GLUE server."""
    prepared = prepare(replace(run, session=replace(run.session, say=silent)))
    prepared.model = load_adapter(prepared.model.unload(), run.folder / ADAPTER).to(run.device)
    beside = run.folder / f".{SERVER}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name, file in prepared.task.server.items():
        split = encode_split(run.config, name, read_split(run.config, name), prepared.tokenizer)
        labels = [prepared.task.read(text) for text in _texts(prepared, split)]
        invalid = sum(label is INVALID for label in labels)
        run.session.say(
            f"{file:<11} {len(labels)} predictions" + (f", {invalid} no label, written as the first" if invalid else "")
        )
        content = server_file(prepared.task, split.examples["idx"], labels)
        write_atomically(beside / file, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    beside.rename(run.folder / SERVER)


HARNESS = Harness(
    kept=KEPT,
    prepare=prepare,
    origin=origin_parts,
    resume=trainer.resume,
    train=train,
    score=score,
    summary=summary,
    card=model_card,
    settings=partial(adapter_settings, kept=("task", "model", "init", "seed"), score="scores"),
    data=data_parts,
    beside_adapter=save_tokenizer,
    extras={SERVER: write_predictions},
    device=text_device,
    hushed=only_our_own_words,
)
