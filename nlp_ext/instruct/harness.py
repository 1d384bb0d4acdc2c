"""Instruction tuning for the spine (`abm_vision.runs.run`): conversations and models, training and perplexity."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from abm_vision.abm.files import write_atomically
from abm_vision.abm.host import Backbone
from abm_vision.abm.restore import evaluate
from abm_vision.runs.content import Origin, version
from abm_vision.runs.device import autocast
from abm_vision.runs.harness import Checkpoint, Harness, Run, Session, SessionOptions
from abm_vision.runs.order import shuffled
from abm_vision.runs.run import run as run_spine
from nlp_ext import trainer
from nlp_ext.batches import answer_tokens
from nlp_ext.instruct import data
from nlp_ext.instruct.answer import answer, perplexity
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.instruct.results import KEPT, model_card, summary
from nlp_ext.models import check_model, load_model
from nlp_ext.quiet import only_our_own_words
from nlp_ext.ranks import is_sharded, processes, text_device
from nlp_ext.textrun import TextRun, adapt, adapter_settings, save_tokenizer, split_content, text_origin
from nlp_ext.trainer import Follow, Progress, training_arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

SAMPLES = "samples.jsonl"


def run(config: InstructConfig, out: str | Path = "results", **session: Unpack[SessionOptions]) -> dict[str, Any]:
    """Tune a LLaMA (or a relative) on instructions, loss on the answers only, and write everything under `out`.

    Under `accelerate launch` every process applies the initialisation, all train the adapter of the first, and only
    that one writes.

    `out` is the parent of the run's folder; `session` are the other fields of `abm_vision.runs.harness.Session`, such
    as rerun, diagnose, say and log. What is returned and raised is that of `abm_vision.runs.run.run`.
    """
    return run_spine(HARNESS, config, Session(out, **session))


# ------------------------------------------------------------------------------------------ data, weights and adapter


@dataclass(kw_only=True)
class InstructRun(TextRun):
    """A run of instruction tuning, with what it is scored on.

    Args:
        held_out: conversations for the perplexity.
        asked: held-out conversations whose last turn the model is to answer, too.
    """

    config: InstructConfig
    held_out: data.Tokens
    asked: list[data.Conversation]

    @property
    def backbone(self) -> Backbone:
        """The model's record, with the mask that the settings ask for."""
        found = super().backbone
        return found if self.config.abm_tokens == "all" else replace(found, token_mask_fn=answer_tokens)


def prepare(run: Run) -> InstructRun:
    """Conversations, model, tokeniser and adapter.

    Raises:
        ValueError, OSError: of the data, the model, or the adapter, each with one message.
    """
    config, say = run.config, run.session.say
    with run.stage("weights"):
        check_model(config.model, AutoModelForCausalLM, say)
    with run.stage("data"):  # before the weights, which take longer: a mistake in a file is reported at once
        conversations = data.read(config.data_source)
        if len(conversations) <= config.held_out:
            raise ValueError(
                f"{config.data_source} has {len(conversations)} conversations, of which {config.held_out} would be "
                "held out: lower --held-out"
            )
    with run.stage("weights"):
        model, tokenizer, weights = load_model(
            config.model,
            AutoModelForCausalLM,
            show_progress_bar=not run.session.quiet,
            **_kept_as(config, run.device),
        )
        model = model if config.base == "4bit" else model.to(run.device)
        tokenizer.padding_side = "right"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.chat_template = tokenizer.chat_template or data.TEMPLATE  # is saved with the adapter
        _check_length(config, model)
        say(f"weights   {weights}, {config.base}")
    with run.stage("data"):
        (order,) = shuffled(len(conversations), len(conversations), config.seed, 0)
        kept, tested = order[: -config.held_out][: config.train_examples or None], order[-config.held_out :]
        train, held_out = (
            data.encode_all(tokenizer, [conversations[k] for k in part], config.length) for part in (kept, tested)
        )
        asked = [conversations[k] for k in tested[: config.samples]]
        cut = f"; {train.cut} of {len(train.rows)} cut at {config.length} tokens (--length)" if train.cut else ""
        held = f"{held_out.conversations} held out"
        say(f"data      {config.data_source}: {train.conversations} conversations, {held}{cut}")
    record = {
        "train": train.record(config.data_source),
        "held_out": held_out.record(config.data_source),
        "sha256": data.digest(conversations),
    }
    content = [partial(split_content, "instruction", record["sha256"])]
    return adapt(
        InstructRun,
        run,
        model,
        text_origin(config, content, version, data.encode_all),
        scored=held_out.rows,
        rows=train.rows,
        weights=weights,
        tokenizer=tokenizer,
        data=record,
        held_out=held_out,
        asked=asked,
    )


def origin_parts(config: InstructConfig) -> list[partial[Origin]]:
    """What gives the content that a run of this configuration would be made of now, but for its tokens."""
    return text_origin(config, [partial(_content, config.data_source)], version, data.encode_all)


def data_parts(config: InstructConfig) -> list[partial[Any]]:
    """What reads the conversations of a run of this configuration."""
    return [partial(data.read, config.data_source)]


def _content(source: str) -> Origin:
    return split_content("instruction", data.digest(data.read(source)))


def _kept_as(config: InstructConfig, device: torch.device) -> dict[str, Any]:
    """How `from_pretrained` is to keep the frozen weights."""
    if config.base != "4bit":
        return {"dtype": {"fp32": torch.float32, "bf16": torch.bfloat16}[config.base]}
    if find_spec("bitsandbytes") is None:
        raise ValueError("base 4bit needs bitsandbytes: pip install bitsandbytes, or use --base bf16")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantised, "device_map": {"": device}, "dtype": torch.bfloat16}


def _check_length(config: InstructConfig, model: torch.nn.Module) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and config.length > longest:
        raise ValueError(f"length is {config.length}; {config.model} reads at most {longest} tokens")


# ---------------------------------------------------------------------------------------------------- train and score


@dataclass(kw_only=True)
class MeasuredRun(InstructRun):
    """The same with `before`, the perplexity of the pretrained model, and `answered`, what it answers."""

    before: float
    answered: list[str]


def measure_pretrained(run: InstructRun, checkpoint: Checkpoint | None) -> MeasuredRun:
    """Perplexity and answers before all; every process has the whole model, and the first one writes."""
    if checkpoint and (found := checkpoint.notes.get("pretrained")):
        return MeasuredRun(**vars(run), **found)
    with run.model.disable_adapter():
        with run.stage("perplexity"):
            before = perplexity(run, run.model)
        with run.stage("samples"):
            answered = _answers(run) if run.processes.main else []
    return MeasuredRun(**vars(run), before=before, answered=answered)


def train(run: MeasuredRun, notes: dict[str, Any], checkpoint: Checkpoint | None) -> Progress:
    """Train to the end, with trl's trainer."""
    config = run.config
    follow = Follow(partial(perplexity, run), config.eval_steps, config.keep == "best") if config.eval_steps else None
    notes = {**notes, "pretrained": {"before": run.before, "answered": run.answered}}
    return trainer.train(make_trainer(run), run, notes, checkpoint, follow)


def make_trainer(run: InstructRun) -> SFTTrainer:
    """trl's trainer for a run."""
    config = run.config
    arguments = training_arguments(
        SFTConfig,
        run,
        gradient_accumulation_steps=config.accumulation,
        gradient_checkpointing=config.checkpointing,  # trl's own default is on
        max_length=config.length,
        packing=config.packing,
    )
    trained = {p: p.data for p in run.model.parameters() if p.requires_grad}
    made = SFTTrainer(
        model=run.model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(run.rows),
        processing_class=run.tokenizer,
    )
    # trl rounds what is trained to bfloat16 on a 4-bit base, where many steps of AdamW would be lost.
    for parameter, value in trained.items():
        parameter.data = value
    return made


def score(run: MeasuredRun, progress: Progress) -> dict[str, Any]:
    """Perplexity after training; some prompts are answered, into a file."""
    after = progress.perplexities.get(progress.kept_step)
    if after is None:
        with run.stage("perplexity"):
            after = perplexity(run, progress.model)
        if run.session.log:
            run.session.log("val/perplexity", after, len(progress.losses))
    run.session.say(f"perplexity of held-out answers {run.before:.2f} before, {after:.2f} after")
    with run.stage("samples"):  # all processes hold a part of a sharded model
        answered = _answers(run) if run.processes.main or is_sharded(run.model) else []
    if run.processes.main:
        samples = [
            {"prompt": turns[:-1], "expected": turns[-1]["content"], "before": before, "answer": after}
            for turns, before, after in zip(run.asked, run.answered, answered, strict=True)
        ]
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_atomically(run.folder / SAMPLES, lambda path: path.write_text(lines, encoding="utf-8"))
    found = {"before": run.before, "after": after, "conversations": run.held_out.conversations}
    return {
        **run.recorded(),
        "steps_per_epoch": progress.steps_per_epoch,
        "perplexity": found,
        "perplexity_per_step": {str(step): value for step, value in progress.perplexities.items()},
        "best_step": progress.kept_step if run.config.keep == "best" else None,
    }


def _answers(run: InstructRun) -> list[str]:
    evaluate(run.model)
    with autocast(run.device, run.precision):
        return [answer(run.model, run.tokenizer, turns[:-1], run.config.new_tokens) for turns in run.asked]


HARNESS = Harness(
    kept=KEPT,
    prepare=prepare,
    origin=origin_parts,
    resume=trainer.resume,
    train=train,
    score=score,
    summary=summary,
    card=model_card,
    settings=partial(adapter_settings, kept=("model", "base", "init", "seed"), score="perplexity"),
    data=data_parts,
    beside_adapter=save_tokenizer,
    leaves=(SAMPLES,),
    measure_pretrained=measure_pretrained,
    device=text_device,
    processes=processes,
    hushed=only_our_own_words,
)
