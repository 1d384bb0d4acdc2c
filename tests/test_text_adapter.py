"""What a run on text leaves for others: an adapter that stock peft loads whole, its tokeniser, answers; and chat."""

import io
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")
pytest.importorskip("trl", reason="trl is not installed")

import torch
from helpers import INSTRUCT, answer, small_instruct
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM, LlamaModel, T5EncoderModel

from abm_vision import add_lora, load_adapter
from nlp_ext import instruct, ranks
from nlp_ext.glue.__main__ import main as glue_main
from nlp_ext.instruct import data, synthetic
from nlp_ext.instruct.__main__ import main

ASKED = [{"role": "user", "content": "Who?"}]


@pytest.fixture(scope="module")
def tuned(llama, tmp_path_factory):
    """A run, whose learning rate is so high that its answers are not the base model's."""
    config = small_instruct(llama, init="kaiming", train_examples=16, lr=0.1, samples=2)
    return instruct.run(config, tmp_path_factory.mktemp("tuned"))


def folder_of(result):
    return Path(result["folder"]) / "adapter"


def test_the_folder_alone_is_model_and_tokeniser_for_stock_peft(tuned, llama):
    """The template writes the tokens that training saw; the base has none of its own."""
    folder = folder_of(tuned)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoPeftModelForCausalLM.from_pretrained(folder)
    turns = data.conversation(synthetic.examples()[0], "")
    (seen,) = data.encode(ByT5Tokenizer(), turns)
    assert AutoTokenizer.from_pretrained(llama).chat_template is None
    assert tokenizer.apply_chat_template(turns, return_dict=False) == seen["input_ids"]
    assert (tokenizer.pad_token_id, tokenizer.padding_side) == (0, "right")
    ids = torch.tensor([seen["input_ids"]])
    ours = load_adapter(LlamaForCausalLM.from_pretrained(llama), folder).eval()
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, ours(input_ids=ids).logits)
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_model_without_a_language_head_has_no_task(kind, request):
    kinds = {"llama": LlamaModel, "t5": T5EncoderModel}
    model = add_lora(kinds[kind].from_pretrained(request.getfixturevalue(kind)), 2)
    assert type(model) is PeftModel and model.peft_config["default"].task_type is None


def test_the_card_has_a_name_for_a_title(tuned, llama):
    card = (folder_of(tuned) / "README.md").read_text()
    (title,) = [line for line in card.splitlines() if line.startswith("# ")]
    assert title == f"# {llama.name}, tuned on instructions" and "AutoTokenizer.from_pretrained" in card


def test_samples_have_the_true_answer_and_that_of_the_base(tuned, llama):
    """The base's by transformers alone; which conversations they are by torch's permutation."""
    rows = [json.loads(line) for line in (Path(tuned["folder"]) / "samples.jsonl").read_text().splitlines()]
    examples, tokenizer = synthetic.examples(), AutoTokenizer.from_pretrained(folder_of(tuned))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0))[-10:]
    base = LlamaForCausalLM.from_pretrained(llama).eval()
    for row, k in zip(rows, order, strict=False):
        turns = data.conversation(examples[k], "")
        assert (row["prompt"], row["expected"]) == (turns[:-1], examples[k]["output"])
        ids = tokenizer.apply_chat_template(row["prompt"], return_tensors="pt", return_dict=False)
        tokens = base.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert row["before"] == tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert len(rows) == 2 and all(row["before"] != row["answer"] for row in rows)


# The base model alone


def test_chat_and_mt_bench_with_a_base_alone(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n\n"), "utf-8"))
    assert answer(["chat", f"--model={llama}", "--new-tokens=5"], capsys, main)[::2] == (0, "")
    questions = tmp_path / "question.jsonl"
    questions.write_text(json.dumps({"question_id": 1, "category": "math", "turns": ["Why?"]}))
    words = ["mt-bench", f"--model={llama}", f"--questions={questions}", f"--out={tmp_path}", "--quiet"]
    assert answer([*words, "--new-tokens=5"], capsys, main)[0] == 0
    (line,) = (tmp_path / "model_answer" / f"{llama.name}.jsonl").read_text().splitlines()
    assert json.loads(line)["model_id"] == llama.name


@pytest.mark.parametrize("words", [["chat"], ["mt-bench", "--questions=question.jsonl"]])
def test_neither_an_adapter_nor_a_model(words, capsys):
    code, _, err = answer(words, capsys, main)
    assert code == 2 and "neither an adapter nor a model is given: --adapter DIR" in err


def test_an_adapter_is_answered_with_its_own_tokeniser(tuned, tmp_path, monkeypatch, capsys):
    """That of the training, whatever lies beside the base model by now."""
    seen = []
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello\n\n"), "utf-8"))
    monkeypatch.setattr("nlp_ext.instruct.talk.answer", lambda model, tokenizer, *rest: seen.append(tokenizer) or "")
    assert answer(["chat", f"--adapter={tuned['folder']}"], capsys, main)[0] == 0
    assert seen[0].chat_template == data.TEMPLATE


# What is refused before it costs anything


def never(*given, **more):
    raise AssertionError("the model is loaded")


def flags(settings):
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"instruction": "a", "output": ""}', "the assistant's answer is empty"),
        ('{"instruction": "a", "output": "b"}', "has 1 conversations, of which 10 would be held out"),
    ],
)
def test_conversations_are_read_before_the_weights(llama, tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setattr("nlp_ext.instruct.harness.load_model", never)
    (tmp_path / "rows.jsonl").write_text(text)
    words = flags({**INSTRUCT, "model": llama, "data": tmp_path / "rows.jsonl", "out": tmp_path / "out"})
    code, _, err = answer([*words, "--quiet"], capsys, main)
    assert code == 2 and message in err


def test_examples_are_read_before_the_weights(t5, tmp_path, monkeypatch, capsys):
    """Those of the last split, too."""
    monkeypatch.setattr("nlp_ext.glue.harness.load_model", never)
    (tmp_path / "train.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 0}')
    (tmp_path / "validation.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": 7}')
    words = flags({"task": "rte", "model": t5, "data": tmp_path, "out": tmp_path / "out"})
    code, _, err = answer([*words, "--quiet"], capsys, glue_main)
    assert code == 2 and "validation.jsonl:1: rte has the label 7" in err


@pytest.mark.parametrize(("command", "model"), [(main, "llama"), (glue_main, "t5")])
def test_deepspeed_is_refused(command, model, tmp_path, monkeypatch, capsys, request):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    words = [f"--model={request.getfixturevalue(model)}", "--data=synthetic", f"--out={tmp_path}", "--quiet"]
    code, _, err = answer(words, capsys, command)
    assert code == 2 and "DeepSpeed is configured" in err and "--use_fsdp --fsdp_version 2" in err


def test_best_weights_of_a_sharded_model_are_refused(llama, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="keep is best, but FSDP shards the model: --keep last"):
        ranks.processes(small_instruct(llama, keep="best", eval_steps=2))
