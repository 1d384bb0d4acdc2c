"""One run of instruction tuning, from a configuration to a result."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import datasets
from abm_vision.runs.start import Say, Tune, start_adapter, stopwatch
from pydantic import Field
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from abm_vision.abm.files import write_atomically, write_json
from abm_vision.runs import folder as files
from abm_vision.runs.content import check_finished, check_origin
from abm_vision.runs.device import autocast, resolve_device
from abm_vision.runs.log import Log
from abm_vision.runs.markup import code, markdown, quoted
from abm_vision.runs.records import Count, Positive, Record, settings_of
from nlp_ext.instruct.answer import answer, perplexity
from nlp_ext.instruct.config import SCHEMA, InstructConfig
from nlp_ext.instruct.setup import Setup, origin_parts, prepare
from nlp_ext.ranks import join, whole_state
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

SAMPLES = "samples.jsonl"


class Conversations(Record):
    """What of a part was taken, as sequences."""

    source: str
    conversations: Positive
    sequences: Positive
    cut: Count
    left_out: Count


class Data(Record):
    """What was trained on and held out; the hash is of all conversations."""

    train: Conversations
    held_out: Conversations
    sha256: str


class Perplexity(Record):
    """On the answers of held-out conversations."""

    before: Annotated[float, Field(ge=1)]
    after: Annotated[float, Field(ge=1)]
    conversations: Positive


class Result(TextResult):
    """`result.json` of instruction tuning."""

    config: settings_of(InstructConfig)
    data: Data
    perplexity: Perplexity


def run(
    config: InstructConfig,
    out: str | Path = "results",
    *,
    rerun: bool = False,
    quiet: bool = True,
    diagnose: bool = False,
    say: Say | None = None,
    log: Log | None = None,
) -> dict[str, Any]:
    """Tune a LLaMA (or a relative) on instructions, loss on the answers only, and write everything under `out`.

    A finished run is read, not repeated; a killed one goes on from its last whole epoch. Under `accelerate launch`
    every process applies the start, all begin with the adapter of the first, and only that one writes.

    Args:
        config: the settings.
        out: parent of the run's folder, which `config.run_name()` names.
        rerun: start afresh even if the run is finished or half done.
        quiet: no progress bars.
        diagnose: measure the adapter's information loss before and after its start, as in the vision harness.
        say: receives a line about every stage, in the first process.
        log: receives every step's loss and learning rate, in the first process (see `abm_vision.runs.log`).

    Returns:
        The content of `result.json`, with `folder` added.

    Raises:
        Busy: another process is at this run.
        ValueError, OSError: as the parts of the run do, each with one message.
    """
    state = join(cpu=resolve_device(config.device).type == "cpu")
    say = say if say and state.is_main_process else lambda line: None
    tune = partial(run, out=out, quiet=quiet, say=say)
    folder = Path(out) / config.run_name()
    with ExitStack() as stack:
        if state.is_main_process:
            files.open_folder(out, config)
            stack.enter_context(files.locked(folder))
            files.settle_precision(folder, config)
        state.wait_for_everyone()
        result = None if rerun else files.read_result(folder, Result, SCHEMA)
        if result is not None:
            say(f"finished before; --rerun repeats it ({folder})")
            if result["processes"] != state.num_processes:
                raise ValueError(
                    f"the run in {folder} was made by {result['processes']} processes, now there are "
                    f"{state.num_processes}, which take more in a step: choose another --out, or --rerun"
                )
            files.check_same_run(result, config, folder)
            check_finished(result["origin"], origin_parts(config), folder)
        if result is None or (diagnose and not result["information_loss"]):
            setup = prepare(config, folder, quiet, say)
            # Only now: what is there is lost for a run that can begin.
            if state.is_main_process and (rerun or (result is None and last_checkpoint(folder) is None)):
                clear(folder, SAMPLES)
            state.wait_for_everyone()
            if result is None:
                result = _run(setup, folder, tune, quiet, diagnose, say, log, state.is_main_process)
            else:
                check_origin(result["origin"], setup.origin, folder)
                started = start_adapter(setup, config, tune, {}, quiet, diagnose, say)
                result = {**result, "information_loss": started["information_loss"]}
        if state.is_main_process:
            finish(result, folder, _headline(result))
        state.wait_for_everyone()
        return {**result, "folder": str(folder)}


def _run(
    setup: Setup, folder: Path, tune: Tune, quiet: bool, diagnose: bool, say: Say, log: Log | None, main: bool
) -> dict[str, Any]:
    config, seconds = setup.config, setup.seconds
    stage = stopwatch(seconds)
    with stage("perplexity"), setup.model.disable_adapter():
        before = perplexity(setup, setup.model)
    notes, checkpoint = begin(setup, folder, tune, quiet, diagnose, say)
    if main:
        write_json(folder / NOTES, notes)
    progress = Progress(config, say, log)
    trainer = _trainer(setup, folder, quiet)
    train(trainer, progress, checkpoint)
    seconds["train"] = sum(progress.seconds)
    with stage("perplexity"):
        after = perplexity(setup, trainer.model_wrapped)
    say(f"perplexity of held-out answers {before:.2f} before, {after:.2f} after")
    state = whole_state(setup.model)
    with stage("samples"):
        samples = _samples(setup) if main or state is not None else []  # all hold a part of a sharded model
    found = {"before": before, "after": after, "conversations": setup.held_out.conversations}
    result = {**common_record(setup, notes, progress), "perplexity": found}
    if main:
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomically(folder / SAMPLES, lambda path: path.write_text(lines, encoding="utf-8"))
        _write_adapter(setup, state, result, folder)
    return result


def _trainer(setup: Setup, folder: Path, quiet: bool) -> SFTTrainer:
    config = setup.config
    arguments = training_arguments(
        SFTConfig,
        config,
        folder,
        setup.device,
        setup.precision,
        warmup=config.warmup,
        quiet=quiet,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.checkpointing,  # trl's own default is on
        max_length=config.length,
        packing=config.packing,
    )
    trained = {p: p.data for p in setup.model.parameters() if p.requires_grad}
    trainer = SFTTrainer(
        model=setup.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(setup.rows),
        processing_class=setup.tokenizer,
    )
    # trl rounds what is trained to bfloat16 on a 4-bit base, where many steps of AdamW would be lost.
    for parameter, value in trained.items():
        parameter.data = value
    return own_callbacks(trainer)


def _samples(setup: Setup) -> list[dict[str, Any]]:
    setup.model.eval()
    with autocast(setup.device, setup.precision):
        return [
            {"prompt": turns, "answer": answer(setup.model, setup.tokenizer, turns, setup.config.new_tokens)}
            for turns in setup.prompts
        ]


def _write_adapter(setup: Setup, state: dict[str, Tensor] | None, result: dict[str, Any], folder: Path) -> None:
    keep = {k: result["config"][k] for k in ("model", "base", "init", "seed")}
    recorded = {"sha256": setup.weights.sha256, "location": setup.weights.location}
    files.write_adapter(
        folder,
        setup.model,
        model_card(result),
        state_dict=state,
        run=keep,
        weights=recorded,
        perplexity=result["perplexity"],
        report=result["abm"],
    )


def _headline(result: dict[str, Any]) -> str:
    marks = [result["data"]["train"]["source"]] + ["tiny stand-in model"] * result["tiny"]
    return f"instructions ({', '.join(marks)}): {perplexity_in_words(result)}"


def perplexity_in_words(result: dict[str, Any]) -> str:
    """Before and after, and of how many conversations."""
    found = result["perplexity"]
    return (
        f"perplexity {found['before']:.2f} before, {found['after']:.2f} after, on the answers of "
        f"{found['conversations']} held-out conversations"
    )


def model_card(result: dict[str, Any]) -> str:
    """What a person needs to know of a saved adapter: what it does, how well, and how to load it."""
    config, weights, train = result["config"], result["weights"], result["data"]["train"]
    base = f"base_model: {quoted(config['model'])}\n" if weights["revision"] else ""
    stand_in = "\nThe base model is a tiny stand-in: it shows that the pipeline works, and nothing more.\n"
    name = quoted(config["model"])
    revision = f" at {markdown(weights['revision'])}" if weights["revision"] else ""
    return f"""---
library_name: peft
{base}tags: [lora, abm-lora, instruction-tuning]
---
# {markdown(config["model"])}, tuned on instructions

LoRA of rank {config["rank"]} (targets: {markdown(config["targets"])}), started with {code(config["init"])}. Trained for
{config["epochs"]} epochs on {train["conversations"]} conversations of {markdown(train["source"])}, loss on the answers
only, seed {config["seed"]}. Held-out {perplexity_in_words(result)}.
{stand_in if result["tiny"] else ""}
Base weights: {markdown(weights["location"])}{revision} in {config["base"]},
sha256 {weights["sha256"]}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
{"from nlp_ext.tiny import tiny_folder" if result["tiny"] else ""}
model = AutoModelForCausalLM.from_pretrained({f"tiny_folder({name})" if result["tiny"] else name})
model = PeftModel.from_pretrained(model, "path/to/this/folder").eval()
```

`python -m nlp_ext.instruct chat --adapter path/to/this/folder` talks to it.
"""
