"""One run of GLUE, from a configuration to a result."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from abm_vision.runs.start import Say, Tune, start_adapter, stopwatch
from pydantic import ConfigDict
from torch.utils.data import Dataset
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from abm_vision.abm.bars import progress
from abm_vision.abm.files import write_atomically, write_json
from abm_vision.abm.loading import load_adapter
from abm_vision.runs import folder as files
from abm_vision.runs.content import check_finished, check_origin
from abm_vision.runs.device import autocast
from abm_vision.runs.log import Log
from abm_vision.runs.markup import code, markdown, quoted
from abm_vision.runs.records import Count, Positive, Record, settings_of
from nlp_ext.glue.config import SCHEMA, GlueConfig
from nlp_ext.glue.scores import score
from nlp_ext.glue.server import server_file
from nlp_ext.glue.setup import Setup, Split, origin_parts, prepare, read_split, target_length
from nlp_ext.glue.tasks import INVALID
from nlp_ext.training import (
    NOTES,
    Progress,
    TextResult,
    begin,
    clear,
    common_record,
    finish,
    last_checkpoint,
    own_callbacks,
    train,
    training_arguments,
)

SERVER = "server"
SHOWN = 5  # texts that are no label, kept in a result


class Examples(Record):
    """What of a split was taken."""

    split: str
    source: str
    examples: Positive
    cut: Count
    sha256: str


class Data(Record):
    """What was trained on, and what was scored."""

    train: Examples
    validation: list[Examples]


class Scores(Record):
    """Metrics by name, and what was no label."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, float]
    count: Positive
    invalid: Count
    invalid_texts: list[str]


class Result(TextResult):
    """`result.json` of a run of GLUE."""

    config: settings_of(GlueConfig)
    data: Data
    scores: dict[str, Scores]


def run(
    config: GlueConfig,
    out: str | Path = "results",
    *,
    rerun: bool = False,
    quiet: bool = True,
    diagnose: bool = False,
    test: bool = False,
    say: Say | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Adapt a T5 to one task of GLUE, score its validation set, and write everything under `out`.

    A finished run is read, not repeated; a killed one goes on from its last whole epoch.

    Args:
        config: the settings.
        out: parent of the run's folder, which `config.run_name()` names.
        rerun: start afresh even if the run is finished or half done.
        quiet: no progress bars.
        diagnose: measure the adapter's information loss before and after its start, as in the vision harness.
        test: write predictions for the test splits in the format of the GLUE server, into the folder `server`; a
            finished run gets them added.
        say: receives a line about every stage.
        log: receives every step's loss and learning rate (see `abm_vision.runs.log`).

    Returns:
        The content of `result.json`, with `folder` added.

    Raises:
        Busy: another process is at this run.
        ValueError, OSError: as the parts of the run do, each with one message.
    """
    say = say or (lambda line: None)
    tune = partial(run, out=out, quiet=quiet, say=say)
    folder = files.open_folder(out, config)
    with files.locked(folder):
        result = None if rerun else files.read_result(folder, Result, SCHEMA)
        if result is not None:
            say(f"finished before; --rerun repeats it ({folder})")
            files.check_same_run(result, config, folder)
            check_finished(result["origin"], origin_parts(config), folder)
            if diagnose and not result["information_loss"]:
                setup = prepare(config, folder, quiet, say)
                check_origin(result["origin"], setup.origin, folder)
                started = start_adapter(setup, config, tune, {}, quiet, diagnose, say)
                result = {**result, "information_loss": started["information_loss"]}
        else:
            setup = prepare(config, folder, quiet, say)
            if rerun or last_checkpoint(folder) is None:  # only now: it is lost for a run that can begin
                clear(folder, SERVER)
            result = _run(setup, folder, tune, quiet, diagnose, say, log)
        finish(result, folder, _headline(result))
        if test and not (folder / SERVER).is_dir():
            _write_predictions(_finished_setup(config, folder, quiet), folder, quiet, say)
        return {**result, "folder": str(folder)}


def _run(
    setup: Setup, folder: Path, tune: Tune, quiet: bool, diagnose: bool, say: Say, log: Log | None
) -> dict[str, Any]:
    config, model, seconds = setup.config, setup.model, setup.seconds
    notes, checkpoint = begin(setup, folder, tune, quiet, diagnose, say)
    write_json(folder / NOTES, notes)
    kept = Progress(config, say, log)
    trainer = _trainer(setup, folder, quiet)
    train(trainer, kept, checkpoint)
    seconds["train"] = sum(kept.seconds)
    with stopwatch(seconds)("validation"):
        scores = {split.name: _score(setup, split, quiet) for split in setup.validation}
    result = {**common_record(setup, notes, kept), "scores": scores}
    keep = {k: result["config"][k] for k in ("task", "model", "init", "seed")}
    recorded = {"sha256": setup.weights.sha256, "location": setup.weights.location}
    files.write_adapter(
        folder, model, model_card(result), run=keep, weights=recorded, scores=scores, report=result["abm"]
    )
    return result


def _trainer(setup: Setup, folder: Path, quiet: bool) -> Trainer:
    config = setup.config
    arguments = training_arguments(
        TrainingArguments,
        config,
        folder,
        setup.device,
        setup.precision,
        warmup=config.warmup,
        quiet=quiet,
        per_device_train_batch_size=config.batch_size,
    )
    return own_callbacks(
        Trainer(
            model=setup.model,
            args=arguments,
            data_collator=DataCollatorForSeq2Seq(setup.tokenizer),
            train_dataset=Rows(setup.rows),
            processing_class=setup.tokenizer,
        )
    )


class Rows(Dataset):
    """Rows of a split, each a fresh mapping: the collator changes what it is given."""

    def __init__(self, rows: list[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, k: int) -> dict[str, list[int]]:
        return dict(self.rows[k])


@torch.no_grad()
def _texts(setup: Setup, split: Split, quiet: bool) -> list[str]:
    """What the model writes for every example, greedily."""
    setup.model.eval()
    size, length = setup.config.batch_size, target_length(setup.task, setup.tokenizer)
    rows = [{"input_ids": row["input_ids"]} for row in split.rows]
    texts: list[str] = []
    for start in progress(range(0, len(rows), size), split.name, show=not quiet):
        with autocast(setup.device, setup.precision):
            tokens = setup.model.generate(
                **setup.batch(rows[start : start + size]), max_new_tokens=length, do_sample=False, num_beams=1
            )
        texts += setup.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return texts


def _score(setup: Setup, split: Split, quiet: bool) -> dict[str, Any]:
    texts = _texts(setup, split, quiet)
    predictions = [setup.task.read(text) for text in texts]
    scores = score(setup.task, predictions, split.examples["label"])
    invalid = sorted({text for text, label in zip(texts, predictions, strict=True) if label is INVALID})
    return {**scores, "count": len(texts), "invalid_texts": invalid[:SHOWN]}


def _write_predictions(setup: Setup, folder: Path, quiet: bool, say: Say) -> None:
    beside = folder / f".{SERVER}.part"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name, file in setup.task.server.items():
        split = read_split(setup.config, name, setup.tokenizer)
        labels = [setup.task.read(text) for text in _texts(setup, split, quiet)]
        invalid = sum(label is INVALID for label in labels)
        say(
            f"{file:<11} {len(labels)} predictions" + (f", {invalid} no label, written as the first" if invalid else "")
        )
        content = server_file(setup.task, split.examples["idx"], labels)
        write_atomically(beside / file, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    beside.rename(folder / SERVER)


def _finished_setup(config: GlueConfig, folder: Path, quiet: bool) -> Setup:
    """The run's model with its saved adapter, on the untouched base."""
    setup = prepare(config, folder, quiet, lambda line: None)
    setup.model = load_adapter(setup.model.unload(), folder / files.ADAPTER).to(setup.device)
    return setup


def _headline(result: dict[str, Any]) -> str:
    config = result["config"]
    marks = [result["data"]["train"]["source"]] + ["tiny stand-in model"] * result["tiny"]
    return f"{config['task']} ({', '.join(marks)}): {scores_in_words(result)}"


def scores_in_words(result: dict[str, Any]) -> str:
    """Every metric of every validation split, in per cent, with what was no label."""
    parts = []
    for split, scores in result["scores"].items():
        metrics = [f"{k} {100 * v:.2f}" for k, v in scores.items() if k not in ("invalid", "count", "invalid_texts")]
        no_label = f", {scores['invalid']} no label" if scores["invalid"] else ""
        parts.append(f"{', '.join(metrics)} % of {scores['count']} {split} examples{no_label}")
    return "; ".join(parts)


def model_card(result: dict[str, Any]) -> str:
    """What a person needs to know of a saved adapter: what it does, how well, and how to load it."""
    config, weights = result["config"], result["weights"]
    base = f"base_model: {quoted(config['model'])}\n" if weights["revision"] else ""
    stand_in = "\nThe base model is a tiny stand-in: it shows that the pipeline works, and nothing more.\n"
    name = quoted(config["model"])
    revision = f" at {markdown(weights['revision'])}" if weights["revision"] else ""
    return f"""---
library_name: peft
{base}tags: [lora, abm-lora, t5]
---
# {markdown(config["model"])}, adapted to GLUE's {config["task"]}

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}), started with {code(config["init"])}. Trained for
{config["epochs"]} epochs on {result["data"]["train"]["examples"]} examples of
{markdown(result["data"]["train"]["source"])} as text to text, seed {config["seed"]}. Validation:
{scores_in_words(result)}.
{stand_in if result["tiny"] else ""}
Base weights: {markdown(weights["location"])}{revision}, sha256
{weights["sha256"]}.

```python
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM
{"from nlp_ext.tiny import tiny_folder" if result["tiny"] else ""}
model = AutoModelForSeq2SeqLM.from_pretrained({f"tiny_folder({name})" if result["tiny"] else name})
model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()
```
"""
