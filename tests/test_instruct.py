"""Instruction tuning on a tiny LLaMA with random weights: data, labels, result, processes, chat, MT-Bench."""

import io
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")

import torch
from helpers import INSTRUCT as SMALL
from helpers import answer as answer_of
from helpers import small_instruct as small
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import ByT5Tokenizer, LlamaForCausalLM

from abm_vision.runs import folder as files
from abm_vision.runs.harness import Processes, Run, Session
from nlp_ext import trainer
from nlp_ext.instruct import data, harness, run, synthetic
from nlp_ext.instruct.__main__ import main
from nlp_ext.instruct.answer import answer
from nlp_ext.instruct.config import InstructConfig
from nlp_ext.instruct.talk import mt_bench
from nlp_ext.ranks import join


@pytest.fixture(scope="module")
def base(llama):
    return llama


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    lines = []
    return run(small(base), out, say=lines.append), lines, out


def flags(settings):
    return [f"--{k.replace('_', '-')}={v}" for k, v in settings.items()]


# The spine's own trainer in somebody else's hands


@pytest.mark.checkout
def test_the_example_with_trl(base, tmp_path, monkeypatch):
    """Stock peft reads the adapter, whose boundaries were matched before training."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    import trl_sft

    model = tmp_path / "model"
    shutil.copytree(base, model)
    tokenizer = ByT5Tokenizer.from_pretrained(model)
    tokenizer.chat_template = data.TEMPLATE
    tokenizer.save_pretrained(model)
    assert math.isfinite(trl_sft.main(str(model), steps=2, out=str(tmp_path / "adapter")))
    tuned = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "adapter")
    factors = [p for n, p in tuned.named_parameters() if "lora_B" in n]
    assert len(factors) == 14 and all(p.abs().max() > 0 for p in factors)
    assert json.loads((tmp_path / "adapter" / "abm.json").read_text())["report"]["samples"] > 0


# Conversations and labels


def test_columns_that_are_known():
    asked, answered = {"role": "user", "content": "Add.\n\n1 1"}, {"role": "assistant", "content": "2"}
    for row in (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "Add.\n\n1 1", "output": "2"},
        {"instruction": "Add.\n\n1 1", "input": None, "output": "2"},
        {"messages": [asked, answered]},
        {"conversations": [{"from": "human", "value": "Add.\n\n1 1"}, {"from": "gpt", "value": "2"}]},
    ):
        assert data.conversation(row, "row") == [asked, answered]


def said(role, content="a"):
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "a", "answer": "b"}, "has the columns question, answer; needed are instruction and output"),
        ({}, "has the columns of nothing; needed are instruction"),
        ({"instruction": "a", "output": " "}, "the assistant's answer is empty .turn 2.: leave this example out"),
        ({"instruction": None, "output": "b"}, "3: instruction is None; a text is needed"),
        ({"instruction": "a", "output": 4}, "3: output is 4; a text is needed"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, r"3: input is \['b'\]; a text is needed"),
        ({"instruction": "\ud800", "output": "c"}, r"3: instruction has half a character \('.ud800'\) at 0: fix it"),
        ({"messages": []}, "has the columns messages; needed are instruction"),
        ({"messages": "hello"}, "messages is 'hello'; needed is a list of turns"),
        ({"messages": {"role": "user"}}, "messages is .*; needed is a list of turns"),
        ({"messages": ["a", "b"]}, "example 3, turn 1, is 'a'; needed are role and content"),
        ({"messages": [[said("user")], [said("assistant")]]}, r"turn 1, is \[\{.*; needed are role and content"),
        ({"messages": [said("tool")]}, "turn 1, has the role 'tool'; allowed are human, user, gpt, assistant, system"),
        ({"messages": [said(["user"])]}, r"turn 1, has the role \['user'\]; allowed are"),
        ({"messages": [{"content": "a"}]}, "turn 1, has the role None; allowed are"),
        ({"messages": [said("user", None)]}, "turn 1: content is None; a text is needed"),
        ({"messages": [said("user", [{"type": "text", "text": "a"}])]}, r"turn 1: content is \[\{.*; a text is needed"),
        ({"messages": [said("user"), {**said("assistant"), "tool_calls": [{}]}]}, "turn 2, has tool_calls; .* tools"),
        ({"messages": [said("user")]}, "3 ends without an answer"),
        ({"messages": [said("system")]}, "3 ends without an answer"),
        ({"messages": [said("user"), said("user"), said("assistant")]}, "turn 2, is the user's; the assistant's comes"),
        ({"messages": [said("assistant"), said("user"), said("assistant")]}, "turn 1, is the assistant's; the user's"),
        ({"messages": [said("user"), said("assistant"), said("assistant")]}, "turn 3, is the assistant's; the user's"),
        ({"messages": [said("user"), said("system"), said("assistant")]}, "turn 2, is the system's; the assistant's"),
        ({"messages": [said("system"), said("assistant")]}, "turn 2, is the assistant's; the user's comes there"),
        ({"messages": [said("user"), said("assistant", "\n"), said("user"), said("assistant")]}, "is empty .turn 2."),
    ],
)
def test_rows_that_are_not(row, message):
    with pytest.raises(ValueError, match=message):
        data.conversation(row, "file, example 3")


def test_an_empty_question_and_control_characters_are_texts():
    (found,) = (data.conversation({"messages": [said("user", ""), said("assistant", "a\0b")]}, "file:1"),)
    assert found == [said("user", ""), said("assistant", "a\0b")]


@pytest.mark.parametrize(
    "template", [None, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}\n{% endfor %}"]
)
def test_labels_are_the_answers_alone(template):
    """Against the text: what stands between the marks of the template, by hand."""
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = template
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hällo"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Gut: ß"},
    ]
    (row,) = data.encode(tokenizer, turns)
    parts, current = [], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        assert label in (-100, token)
        if label == -100:
            parts += [current] if current else []
            current = []
        else:
            current.append(token)
    parts += [current] if current else []
    expected = ["Hi.", "Gut: ß"] if template is None else ["assistant: Hi.\n", "assistant: Gut: ß\n"]
    assert [tokenizer.decode([t for t in part if t > 1]) for part in parts] == expected
    if template is None:
        assert [part[-1] for part in parts] == [1, 1]  # the end of an answer is learnt, too
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert text.startswith("Be kind.\n\n### Instruction:\nHällo\n\n### Response:\nHi.### Instruction:\nAnd?")


def test_columns_beside_the_turns():
    """As LLaMA-Factory writes them; they were part of what the model is to see."""
    system = {"role": "system", "content": "Be a pirate."}
    row = {"instruction": "q", "output": "a", "system": "Be a pirate.", "history": [["q0", "a0"]]}
    found = data.conversation(row, "row")
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert found[0] == system and [turn["role"] for turn in found] == roles
    assert [turn["content"] for turn in found[1:]] == ["q0", "a0", "q", "a"]
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "arr"}]
    assert data.conversation({"system": "Be a pirate.", "conversations": turns}, "row")[0] == system
    both = {
        "system": "x",
        "messages": [system, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    }
    for bad, message in (
        (both, "a column system, and the system's turn as well"),
        ({**row, "history": ["x"]}, "needed is a list of pairs"),
        ({**row, "tools": '[{"name": "f"}]'}, "has tools; conversations with tools"),
    ):
        with pytest.raises(ValueError, match=message):
            data.conversation(bad, "row")


THINKING = (  # as Qwen3's: what was thought is shown with the last answer only, and a turn has an end of its own
    "{% for m in messages %}{{ '<' + m['role'] + '>' }}{% if m['role'] == 'assistant' and loop.last %}{{ '(thought)' }}"
    "{% endif %}{{ m['content'] + '<extra_id_9>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def test_a_template_that_rewrites_answers_gives_each_a_row():
    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = THINKING
    turns = [t for k in "12" for t in data.conversation({"instruction": f"q{k}", "output": f"a{k}"}, "row")]
    rows = data.encode(tokenizer, turns)
    texts = [tokenizer.decode(row["input_ids"]) for row in rows]
    first = "<user>q1<extra_id_9>\n<assistant>"
    assert texts == [
        first + "(thought)a1<extra_id_9>\n",
        first + "a1<extra_id_9>\n<user>q2<extra_id_9>\n<assistant>(thought)a2<extra_id_9>\n",
    ]
    learnt = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in rows]
    assert learnt == ["(thought)a1<extra_id_9>\n", "(thought)a2<extra_id_9>\n"]
    tokens = data.encode_all(tokenizer, [turns, turns[:2]], 500)
    assert (tokens.conversations, len(tokens.rows)) == (2, 3)


def test_an_answer_ends_where_the_template_ends_it(base):
    """What `generate` stops at: the end of text and that of a turn."""
    tokenizer = ByT5Tokenizer()
    assert data.end_of_turn(tokenizer) == 1  # the template for models that have none ends with the end of text
    tokenizer.chat_template = THINKING
    end = tokenizer.convert_tokens_to_ids("<extra_id_9>")
    assert data.end_of_turn(tokenizer) == end
    model = LlamaForCausalLM.from_pretrained(base).eval()
    seen = {}
    model.generate = lambda input_ids, **options: seen.update(options) or input_ids
    assert answer(model, tokenizer, [{"role": "user", "content": "q"}], 5) == ""
    assert seen["eos_token_id"] == [1, end]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    assert data.end_of_turn(tokenizer) is None


def test_templates_that_refuse_or_leave_out():
    tokenizer = ByT5Tokenizer()
    turns = data.conversation({"instruction": "a", "output": "b"}, "row")
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}x"
    with pytest.raises(ValueError, match=r"takes no conversation of system, user.*no system"):
        data.encode(tokenizer, [{"role": "system", "content": "s"}, *turns])
    tokenizer.chat_template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match="leaves the assistant's answers out"):
        data.encode(tokenizer, turns)


def test_long_conversations_are_cut_and_counted():
    tokenizer = ByT5Tokenizer()
    turns = data.conversation({"instruction": "a" * 20, "output": "b" * 30}, "row")
    (whole,) = data.encode(tokenizer, turns)
    start = next(k for k, label in enumerate(whole["labels"]) if label != -100)
    tokens = data.encode_all(tokenizer, [turns, turns[:1] + [{"role": "assistant", "content": "c"}]], start + 4)
    assert (len(tokens.rows), tokens.cut, tokens.left_out) == (2, 1, 0)
    assert [len(row["input_ids"]) for row in tokens.rows] == [start + 4, start + 2]
    longer = data.conversation({"instruction": "a" * 200, "output": "b"}, "row")
    assert data.encode_all(tokenizer, [turns, longer], start + 4).left_out == 1
    with pytest.raises(ValueError, match=r"every answer lies beyond token 24: raise --length"):
        data.encode_all(tokenizer, [longer], 24)


def test_files(tmp_path):
    rows = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "input": "d", "output": "e"}]
    for name, text in {
        "a.json": json.dumps(rows),
        "a.jsonl": "\n".join(map(json.dumps, rows)),
    }.items():
        (tmp_path / name).write_text(text)
        assert [turns[-1]["content"] for turns in data.read(str(tmp_path / name))] == ["b", "e"]
    (tmp_path / "columns.jsonl").write_text('\n{"x": 1}\n')
    with pytest.raises(ValueError, match=r"columns\.jsonl:2 has the columns x; needed are instruction"):
        data.read(str(tmp_path / "columns.jsonl"))
    (tmp_path / "rows.csv").write_text("instruction,output\na,b\n")
    with pytest.raises(
        ValueError, match=r"rows\.csv ends in \.csv; files that are read are \.json, \.jsonl, \.parquet"
    ):
        data.read(str(tmp_path / "rows.csv"))
    with pytest.raises(FileNotFoundError, match="no file"):
        data.read(str(tmp_path / "absent.jsonl"))


def test_made_up_instructions_are_right():
    """By reading the sentence again: subject, verb, object and place stand in this order."""
    seen = set()
    for example in synthetic.examples()[:300]:
        instruction, sentence, output = example["instruction"], example["input"], example["output"]
        seen.add(instruction)
        if instruction == "Write it in capitals.":
            assert output == sentence.upper()
        elif instruction == "Who did it?":
            assert sentence.startswith(f"{output} ") and len(output.split()) == 3
        elif instruction in ("To whom was it done?", "Where did it happen?"):
            assert f" {output}" in sentence
        else:
            assert set(sentence.split()) - set(output.split()) <= {"saw", "hid"}
    assert len(seen) == 6


# Runs


def test_result_says_everything(finished, base):
    result, lines, _ = finished
    folder = Path(result["folder"])
    assert json.loads((folder / "result.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
    assert result["schema"] == "instruct-3" and result["processes"] == 1 and not result["tiny"]
    assert len(result["loss_per_step"]) == 2 * 5
    assert result["data"]["train"]["conversations"] == 80 and result["data"]["held_out"]["conversations"] == 10
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 1 and samples[0]["prompt"][-1]["role"] == "user"
    assert any(line.startswith("perplexity of held-out answers") for line in lines)
    assert (folder / "curves.png").stat().st_size and not (folder / "checkpoints").exists()
    assert "[synthetic]" in harness.summary(result) and "10 held-out conversations" in harness.summary(result)


def test_perplexity_by_stock_peft_one_conversation_at_a_time(finished, base):
    """In double precision, token by token, without padding."""
    result, _, _ = finished
    examples = synthetic.examples()
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))
    rows = [data.encode(ByT5Tokenizer(), data.conversation(examples[k], ""))[0] for k in order[-10:]]
    for moment in ("before", "after"):
        model = LlamaForCausalLM.from_pretrained(base).double()
        if moment == "after":
            model = PeftModel.from_pretrained(model, Path(result["folder"]) / "adapter").double()
        total, count = 0.0, 0
        for row in rows:
            logits = model.eval()(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            for k, label in enumerate(row["labels"][1:]):
                if label != -100:
                    total += F.cross_entropy(logits[k], torch.tensor(label)).item()
                    count += 1
        assert result["perplexity"][moment] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_a_finished_run_is_read_and_can_be_diagnosed(finished, base, monkeypatch):
    result, _, out = finished
    diagnosed = run(small(base), out, diagnose=True)
    assert 0 < diagnosed["information_loss"]["after"]["overall"]["loss"] < 1
    monkeypatch.setattr(harness, "HARNESS", replace(harness.HARNESS, prepare=None))
    assert run(small(base), out, diagnose=True) == diagnosed


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "batch_size": 2, "length": 192},
        {"checkpointing": True, "accumulation": 2},
    ],
)
def test_a_killed_run_goes_on_with_the_same_result(base, tmp_path, monkeypatch, settings):
    config = small(base, **settings)
    whole = run(config, tmp_path / "whole")
    save = trainer.Progress.on_save

    def die(self, *arguments, **more):
        save(self, *arguments, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Progress, "on_save", die)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed")
    monkeypatch.undo()
    lines = []
    resumed = run(config, tmp_path / "killed", say=lines.append)
    assert "resumed   after epoch 1 of 2" in lines
    assert resumed["loss_per_step"] == whole["loss_per_step"]
    adapters = [(Path(r["folder"]) / "adapter" / "adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_answers_alone_may_be_matched(finished, base, tmp_path):
    config = small(base, abm_tokens="answers", epochs=1)
    assert small(base).abm_tokens == "all" and run(config, tmp_path)["abm"]["layers"] != finished[0]["abm"]["layers"]


TWO = """
import json, os, sys
from dataclasses import replace
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import DistributedType

if sys.argv[3] == "fsdp":
    os.environ.update(
        ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP"
    )
    init = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):  # accelerate shards on accelerators only
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus

from abm_vision.runs import run as spine
from abm_vision.runs.initialise import fingerprint
from nlp_ext import ranks, trainer
from nlp_ext.instruct import harness
from nlp_ext.instruct.config import InstructConfig

initialise, train, gather, out = spine.initialise, harness.HARNESS.train, ranks.whole_state, Path(sys.argv[2])
seen = {"sharded": False, "saved": []}
saved = trainer.Progress.on_save

def apart(run, *rest):  # what other hardware would do to one of the processes
    found = initialise(run, *rest)
    for name, parameter in run.model.named_parameters():
        if "lora_" in name:
            parameter.data.add_(PartialState().process_index)
    seen["own"] = fingerprint(run.model)
    return found

def look(run, *rest):
    seen["start"] = fingerprint(run.model)
    return train(run, *rest)

def save(self, args, state, control, **more):
    saved(self, args, state, control, **more)
    seen["saved"].append(state.global_step)

def whole(model):
    layers = model.get_base_model().model.layers.parameters()
    seen["sharded"] = all(type(p).__name__ == "DTensor" for p in layers)
    return gather(model)

spine.initialise, ranks.whole_state, trainer.Progress.on_save = apart, whole, save
harness.HARNESS = replace(harness.HARNESS, train=look)
minutes = 1e-9 if os.environ["RANK"] == "0" else 1e9  # another clock
result = harness.run(InstructConfig.make(**json.loads(sys.argv[1])), out, save_minutes=minutes)
seen.update(processes=result["processes"], perplexity=result["perplexity"]["after"])
(out / f"rank{PartialState().process_index}.json").write_text(json.dumps(seen))
"""


def in_two_processes(base, out, kind):
    """What each process saw, and the folder of the run. Two gloo processes on CPU; the second's start is spoilt."""
    (out / "two.py").write_text(TWO)
    settings = {**SMALL, "model": str(base), "epochs": 1, "batch_size": 8}
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    words += [str(out / "two.py"), json.dumps(settings), str(out), kind]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = out.glob("*/result.json")
    return [json.loads((out / f"rank{k}.json").read_text()) for k in (0, 1)], path.parent


@pytest.fixture(scope="module")
def replicated(base, tmp_path_factory):
    return in_two_processes(base, tmp_path_factory.mktemp("ddp"), "ddp")


@pytest.mark.slow
def test_two_processes_start_from_one_adapter(replicated):
    """The first's start is handed round."""
    (first, second), folder = replicated
    assert first["own"] != second["own"] and first["own"] == first["start"] == second["start"]
    assert first["processes"] == second["processes"] == 2 and first["perplexity"] == second["perplexity"]
    assert len(read(folder)["loss_per_step"]) == 5  # 80 conversations, 8 a process
    assert first["saved"] == second["saved"] == [1, 2, 3, 4, 5]  # when the first's clock says so


@pytest.mark.slow
def test_a_sharded_model_trains_as_a_replicated_one(replicated, base, tmp_path):
    """FSDP 2 against DDP: every layer is sharded, loss and saved adapter are the same."""
    seen, folder = in_two_processes(base, tmp_path, "fsdp")
    assert [s["sharded"] for s in seen + replicated[0]] == [True, True, False, False]
    expected = read(replicated[1])
    assert read(folder)["loss_per_step"] == pytest.approx(expected["loss_per_step"], rel=1e-6)
    assert read(folder)["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)
    assert (folder / "samples.jsonl").read_text() == (replicated[1] / "samples.jsonl").read_text()
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, replicated[1]))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-6, rtol=1e-4)


def test_fsdp_of_version_1(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP is of version 1.*--fsdp_version 2"):
        join(cpu=True)


def read(folder):
    return json.loads((folder / "result.json").read_text())


def test_packed_conversations_do_not_see_one_another(base, tmp_path):
    """The loss of a packed batch is that of its conversations one at a time, token-weighted."""
    config = small(base, packing=True, batch_size=2)  # a batch is one sequence: its attention grows with the square
    folder = files.open_folder(tmp_path, config)
    where = {"device": torch.device("cpu"), "precision": "fp32"}
    run = harness.prepare(Run(config=config, folder=folder, session=Session(), processes=Processes(), **where))
    batch = next(iter(harness.make_trainer(run).get_train_dataloader()))
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    assert len(starts) > 5
    model = LlamaForCausalLM.from_pretrained(base).eval()  # B is zero: the adapter changes nothing
    total, count = 0.0, 0
    for begin, end in pairwise(starts):
        ids, labels = batch["input_ids"][:, begin:end], batch["labels"][0, begin:end]
        logits = model(input_ids=ids).logits[0, :-1]
        total += F.cross_entropy(logits, labels[1:], reduction="sum").item()
        count += int((labels[1:] != -100).sum())
    packed = run.model.eval()(**batch).loss.item()
    assert packed == pytest.approx(total / count, rel=1e-5)


# Commands


@pytest.mark.slow
def test_the_real_command(base, tmp_path):
    words = [
        sys.executable,
        "-m",
        "nlp_ext.instruct",
        *flags({**SMALL, "epochs": 1, "batch_size": 2}),
        f"--model={base}",
        "--json",
    ]
    done = subprocess.run([*words, f"--out={tmp_path}", "--packing"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["config"]["packing"] is True and done.stderr == ""


def typed(text, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))


def test_chat(finished, monkeypatch, capsys):
    typed(b"Hello\nAnd?\n\n", monkeypatch)
    code, _, err = answer_of(["chat", f"--adapter={finished[0]['folder']}", "--new-tokens=5"], capsys, main)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("line", "encoding", "errors"),
    [
        (b"caf\xe9\n", "utf-8", "strict"),
        (b"caf\xe9\n", "utf-8", "surrogateescape"),
        ("é\n".encode(), "ascii", "strict"),
    ],
)
def test_lines_that_are_no_text(finished, capsys, monkeypatch, line, encoding, errors):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line), encoding, errors))
    assert main(["chat", f"--adapter={finished[0]['folder']}", "--new-tokens=5"]) == 2
    assert f"abm-instruct: error: a line is no text in {encoding} (" in capsys.readouterr().err


def test_chat_without_an_adapter(tmp_path, base, capsys):
    assert main(["chat", f"--adapter={tmp_path}/none"]) == 2
    assert f"no folder {tmp_path}/none: give that of a finished run" in capsys.readouterr().err
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    assert main(["chat", f"--adapter={tmp_path}"]) == 2
    assert f"no adapter_config.json in {adapter}" in capsys.readouterr().err
    stock = LoraConfig(target_modules=["q_proj"])  # peft's own files name a base, but not as this package does
    get_peft_model(LlamaForCausalLM.from_pretrained(base), stock).save_pretrained(adapter)
    assert main(["chat", f"--adapter={tmp_path}"]) == 2
    assert "does not say which model it adapts: give it with --model" in capsys.readouterr().err


def test_mt_bench(finished, tmp_path, capsys):
    result, _, _ = finished
    questions = tmp_path / "question.jsonl"
    rows = [{"question_id": 81, "category": "writing", "turns": ["Write.", "More."]}]
    rows += [{"question_id": 101, "category": "reasoning", "turns": ["Why?", "Really?"]}]
    questions.write_text("\n".join(map(json.dumps, rows)))
    words = ["mt-bench", f"--adapter={result['folder']}", f"--questions={questions}", "--new-tokens=5", "--quiet"]
    answers = []
    for _ in range(2):
        assert main([*words, f"--out={tmp_path}", "--name=mine"]) == 0
        lines = (tmp_path / "model_answer" / "mine.jsonl").read_text().splitlines()
        answers.append([json.loads(line) for line in lines])
    for line, row in zip(answers[0], rows, strict=True):
        assert set(line) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        assert line["question_id"] == row["question_id"] and line["model_id"] == "mine"
        assert line["choices"][0]["index"] == 0 and len(line["choices"][0]["turns"]) == 2
    assert [a["choices"] for a in answers[0]] == [a["choices"] for a in answers[1]]  # drawn with a seed
    assert str(tmp_path / "model_answer" / "mine.jsonl") in capsys.readouterr().out
    for text, message in (
        ("{", "question.jsonl:1 is not JSON"),
        ('{"a": 1}', "question.jsonl:1: a question has question_id"),
        ('{"question_id": [1], "turns": ["a"]}', "question.jsonl:1: a question has question_id"),
        ('{"question_id": 1, "turns": "Write."}', "turns is 'Write.'; needed is a list of texts"),
        ('{"question_id": 1, "turns": ["a", 2]}', "a turn is 2; a text is needed"),
        ('{"question_id": 1, "turns": [" "]}', "a turn is empty"),
        ('{"question_id": 1, "turns": ["a"], "category": ["math"]}', "category is ['math']; a text is needed"),
        (2 * '{"question_id": 1, "turns": ["a"]}\n', "question.jsonl:2: question_id 1 is in"),
        ("", "is empty"),
    ):
        questions.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            mt_bench(None, questions, tmp_path, "mine", 0, False)
    assert main([*words, f"--out={tmp_path}"]) == 2 and "is empty" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"name is 'a/b'; it names a file, so it has no / in it"):
        mt_bench(None, questions, tmp_path, "a/b", 0, False)
    questions.unlink()
    assert main([*words, f"--out={tmp_path}"]) == 2 and "question.jsonl of FastChat" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 4}, "length is 4; it must be 8 or more"),
        ({"samples": 11}, "samples is 11; at most the 10 held-out"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"packing": "yes"}, "packing is 'yes'; it must be of type bool"),
        ({"base": "8bit"}, "base.*4bit"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        InstructConfig.make(**{**SMALL, **settings})


def test_settings_name_runs_where_the_start_uses_them():
    names = {
        init: {InstructConfig.make(init=init, abm_tokens=tokens).run_name() for tokens in ("all", "answers")}
        for init in ("kaiming", "abm", "eva", "abm_aligned")
    }
    assert {init: len(found) for init, found in names.items()} == {"kaiming": 1, "abm": 2, "eva": 2, "abm_aligned": 2}


def test_other_processes_are_not_the_same_run(finished, base, monkeypatch):
    result, _, out = finished
    path = Path(result["folder"]) / "result.json"
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "processes": 8}))
    with pytest.raises(ValueError, match=r"made by another number of processes \(8 then, 1 now\)"):
        run(small(base), out)
    path.write_text(whole)


def test_a_conversation_longer_than_the_model(finished, monkeypatch, capsys):
    typed(b"Hello\n\n", monkeypatch)
    code, _, err = answer_of(["chat", f"--adapter={finished[0]['folder']}", "--new-tokens=500"], capsys, main)
    assert code == 2 and "the model reads at most 512: begin a new one" in err


def test_an_adapter_on_other_weights(finished, base, tmp_path, capsys):
    result, _, _ = finished
    folder = tmp_path / "adapter"
    shutil.copytree(Path(result["folder"]) / "adapter", folder)
    settings = json.loads((folder / "abm.json").read_text())
    settings["weights"]["sha256"] = "0" * 64
    (folder / "abm.json").write_text(json.dumps(settings))
    assert main(["chat", f"--adapter={folder}"]) == 2
    assert f"was tuned on weights of sha256 {'0' * 64}" in capsys.readouterr().err


def test_a_sequence_longer_than_the_model(base, tmp_path, capsys):
    assert main([*flags({**SMALL, "model": base, "length": 600}), f"--out={tmp_path}", "--quiet"]) == 2
    assert f"length is 600; {base} reads at most 512 tokens" in capsys.readouterr().err
    assert main([*flags({**SMALL, "model": base, "held_out": 2400}), f"--out={tmp_path}", "--quiet"]) == 2
    assert "2400 conversations, of which 2400 would be held out: lower --held-out" in capsys.readouterr().err


def test_other_conversations_or_template_are_neither_resumed_nor_handed_back(base, tmp_path, monkeypatch, capsys):
    def write(answer):
        rows = [{"instruction": f"Say {k}.", "output": f"{answer} {k}"} for k in range(90)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write("It is")
    config = small(base, data=str(tmp_path / "rows.jsonl"), init="kaiming", epochs=1)
    result = run(config, tmp_path / "out")
    write("It was")
    with pytest.raises(ValueError, match=r"made with other content: instruction data \(sha256 \w+ then, .* now\)"):
        run(config, tmp_path / "out")
    write("It is")
    with monkeypatch.context() as patch:
        patch.setattr(data, "TEMPLATE", data.TEMPLATE.replace("###", "##"))
        with pytest.raises(ValueError, match="made with other content: encoding"):
            run(config, tmp_path / "out")
    assert run(config, tmp_path / "out") == result
    assert main(["--init=kaiming", "--abm-tokens=answers", f"--out={tmp_path / 'none'}"]) == 2
    assert "abm_tokens is given, but init kaiming has no use for it" in capsys.readouterr().err


@pytest.mark.parametrize(("entry", "message"), [({"run": 3}, "run is 3"), ({"weights": {"sha256": 5}}, "sha256 is 5")])
def test_chat_with_a_damaged_adapter(finished, tmp_path, capsys, entry, message):
    folder = shutil.copytree(Path(finished[0]["folder"]) / "adapter", tmp_path / "adapter")
    (folder / "abm.json").write_text(json.dumps({**json.loads((folder / "abm.json").read_text()), **entry}))
    assert main(["chat", f"--adapter={folder}"]) == 2
    assert message in capsys.readouterr().err
