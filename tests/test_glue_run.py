"""The command for GLUE on a tiny T5 with random weights: result, resume, errors, the server's files."""

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("datasets", reason="datasets is not installed")

import torch
from helpers import GLUE as SMALL
from helpers import answer
from helpers import small_glue as small
from huggingface_hub import constants
from peft import AutoPeftModelForSeq2SeqLM, PeftModel
from transformers import AutoTokenizer, ByT5Tokenizer, T5EncoderModel, T5ForConditionalGeneration

from nlp_ext import trainer
from nlp_ext.glue import harness, run
from nlp_ext.glue.__main__ import main
from nlp_ext.glue.config import GlueConfig
from nlp_ext.glue.harness import shortened
from nlp_ext.glue.server import server_file
from nlp_ext.glue.synthetic import examples
from nlp_ext.glue.tasks import TASKS, get_task


@pytest.fixture(scope="module")
def base(t5):
    return t5


@pytest.fixture
def finished(glue_run):
    return glue_run


def test_runs_on_the_same_examples_share_their_content(t5):
    """A suite finds it once: equal calls, with arguments that can be hashed."""

    def calls(**settings):
        return [(part.func, part.args) for part in harness.origin_parts(small(t5, **settings))]

    first, *others = (calls(), calls(lr=1e-4), calls(seed=1), calls(validation_examples=11))
    same = [[one == other for one, other in zip(first, found, strict=True)] for found in others]
    assert len({*first}) == 5
    # model, training and validation data, encoding; the initialisation is every run's own
    assert same == [[True] * 4 + [False], [True, False, True, True, False], [True, True, False, True, False]]


def test_result_says_everything(finished, base):
    result, lines, _ = finished
    folder = Path(result["folder"])
    assert json.loads((folder / "result.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}
    assert result["schema"] == "glue-3" and not result["tiny"]
    assert set(result["scores"]) == {"validation"} and result["scores"]["validation"]["count"] == 12
    assert len(result["loss_per_step"]) == 2 * 5 and len(result["seconds_per_epoch"]) == 2  # 80 examples in fives
    assert result["data"]["train"] == {
        **result["data"]["train"],
        "split": "train",
        "source": "synthetic",
        "examples": 80,
        "cut": 0,
    }
    assert result["environment"]["packages"]["torch"] and result["weights"]["location"] == str(base)
    assert 0 < result["information_loss"]["after"]["overall"]["loss"] < 1
    assert any(line.startswith("abm") for line in lines) and any(line.startswith("epoch   2 loss") for line in lines)
    assert not (folder / "checkpoints").exists() and not (folder / "notes.json").exists()
    assert (folder / "curves.png").stat().st_size and (folder / "information_loss.png").stat().st_size
    assert "[synthetic]" in harness.summary(result) and "12 validation examples" in harness.summary(result)


def test_a_finished_run_is_read(finished, base, monkeypatch):
    result, _, out = finished
    monkeypatch.setattr(harness, "HARNESS", replace(harness.HARNESS, prepare=None))
    assert run(small(base), out, diagnose=True, extras=("server",)) == result


def test_stock_peft_gives_the_same_predictions(finished, base):
    """Scores again, by transformers and stock peft alone, in a loop over single sentences."""
    result, _, _ = finished
    model = T5ForConditionalGeneration.from_pretrained(base)
    model = PeftModel.from_pretrained(model, Path(result["folder"]) / "adapter").eval()
    tokenizer, task, right, invalid = ByT5Tokenizer(), get_task("rte"), 0, 0
    for example in examples("rte", "validation")[:12]:
        ids = tokenizer(task.source(example), return_tensors="pt").input_ids
        text = tokenizer.decode(model.generate(input_ids=ids, max_new_tokens=15)[0], skip_special_tokens=True)
        label = task.read(text)
        invalid += label is None
        right += label == example["label"]
    scores = result["scores"]["validation"]
    assert (scores["accuracy"], scores["invalid"]) == (pytest.approx(right / 12), invalid)


def test_a_t5_adapter_is_one_for_sequence_to_sequence(finished):
    folder = Path(finished[0]["folder"]) / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    inputs = AutoTokenizer.from_pretrained(folder)("rte sentence1: a", return_tensors="pt")
    model = AutoPeftModelForSeq2SeqLM.from_pretrained(folder)
    assert model.generate(**inputs, max_new_tokens=2).shape == (1, 3)


@pytest.mark.slow
def test_seeds_repeat_and_predictions_may_come_later(finished, base, tmp_path):
    """Then by the saved adapter, the same as those of the run itself."""
    result, _, _ = finished
    again, other = run(small(base), tmp_path), run(small(base, seed=1, epochs=1), tmp_path)
    assert result["loss_per_step"] == again["loss_per_step"]
    assert result["loss_per_step"][0] != other["loss_per_step"][0]
    later = run(small(base), tmp_path, extras=("server",))
    files = [(Path(r["folder"]) / "server" / "RTE.tsv").read_text() for r in (result, later)]
    assert files[0] == files[1]


def test_server_file_of_the_run(finished):
    result, _, _ = finished
    lines = (Path(result["folder"]) / "server" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 401
    assert all(line.split("\t")[1] in ("entailment", "not_entailment") for line in lines[1:])


@pytest.mark.parametrize(
    ("task", "predictions", "expected"),
    [
        ("cola", [1, 0, None], "index\tprediction\n4\t0\n7\t1\n9\t0\n"),
        ("mnli", [2, 0, None], "index\tprediction\n4\tentailment\n7\tcontradiction\n9\tentailment\n"),
        ("stsb", [2.6, 5.0, None], "index\tprediction\n4\t5.000\n7\t2.600\n9\t0.000\n"),
    ],
)
def test_server_format(task, predictions, expected):
    assert server_file(get_task(task), [7, 4, 9], predictions) == expected
    with pytest.raises(ValueError, match="argument"):
        server_file(get_task(task), [7], predictions)


def test_every_file_that_the_server_wants_is_written():
    wanted = "CoLA MNLI-m MNLI-mm MRPC QNLI QQP RTE SST-2 STS-B WNLI AX".split()
    assert sorted(f"{name}.tsv" for name in wanted) == sorted(
        f for task in TASKS.values() for f in task.server.values()
    )


@pytest.mark.parametrize("init", ["abm", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_with_the_same_result(finished, base, tmp_path, monkeypatch, init):
    config = small(base, init=init)
    whole = finished[0] if init == "abm" else run(config, tmp_path / "whole")
    first_epoch = trainer.Progress.on_save

    def die(self, args, state, control, **more):
        first_epoch(self, args, state, control, **more)
        (Path(args.output_dir) / "checkpoint-999").mkdir()  # half of another one
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Progress, "on_save", die)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "killed")
    monkeypatch.undo()
    lines = []
    resumed = run(config, tmp_path / "killed", say=lines.append)
    assert "resumed   after epoch 1 of 2" in lines
    assert resumed["loss_per_step"] == whole["loss_per_step"] and resumed["scores"] == whole["scores"]
    adapters = [(Path(r["folder"]) / "adapter" / "adapter_model.safetensors").read_bytes() for r in (whole, resumed)]
    assert adapters[0] == adapters[1]


def test_divergence_is_one_message(base, tmp_path, capsys):
    words = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    code = main([*words, f"--model={base}", "--lr=1e30", f"--out={tmp_path}", "--quiet"])
    assert code == 2 and "the training loss is not finite in step" in capsys.readouterr().err


def test_a_tuned_reference_is_made_and_counted(base, tmp_path):
    result = run(small(base, init="abm_tuned", epochs=1), tmp_path)
    assert result["reference"]["seconds"] > 0 and len(list(tmp_path.glob("rte-kaiming-*/result.json"))) == 1


def test_long_inputs_are_cut_and_counted(base, tmp_path):
    assert shortened([5, 6, 7, 8, 1], 3) == [5, 6, 1] and shortened([5, 1], 3) == [5, 1]
    result = run(small(base, epochs=1, source_tokens=90, init="kaiming"), tmp_path)
    longest = [len(get_task("rte").source(e).encode()) + 1 for e in examples("rte", "validation")[:12]]
    assert result["data"]["validation"][0]["cut"] == sum(n > 90 for n in longest) > 0


def write_rows(folder, change=lambda row: row):
    folder.mkdir(exist_ok=True)
    for split, count in (("train", 80), ("validation", 12)):
        rows = [change(dict(row)) for row in examples("rte", split)[:count]]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in rows))


def die_after_an_epoch(config, out, monkeypatch):
    saved = trainer.Progress.on_save

    def die(self, args, state, control, **more):
        saved(self, args, state, control, **more)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Progress, "on_save", die)
        run(config, out)


@pytest.mark.slow
def test_other_content_is_neither_resumed_nor_handed_back(base, tmp_path, monkeypatch):
    model = shutil.copytree(base, tmp_path / "model")
    write_rows(tmp_path / "data")
    settings = {"data": str(tmp_path / "data"), "init": "kaiming"}
    finished, broken = (small(model, epochs=n, **settings) for n in (1, 2))
    result = run(finished, tmp_path / "out")
    die_after_an_epoch(broken, tmp_path / "out", monkeypatch)

    def refused(named):
        for config in (finished, broken):
            with pytest.raises(ValueError, match=rf"made with other content: {named} \(.* then, .* now\).*--rerun"):
                run(config, tmp_path / "out")

    write_rows(tmp_path / "data", lambda row: {**row, "label": 1 - row["label"]})
    refused("train data .* then, .* now\\), validation data")
    write_rows(tmp_path / "data")
    settings = (model / "config.json").read_text()
    (model / "config.json").write_text(settings.replace('"relu"', '"gelu"'))
    refused("model configuration")
    (model / "config.json").write_text(settings)
    tokenizer = (model / "tokenizer_config.json").read_text()
    (model / "tokenizer_config.json").write_text(tokenizer + " ")
    refused("tokenizer")
    (model / "tokenizer_config.json").write_text(tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(harness, "shortened", lambda ids, length: ids[:length])
        refused("encoding")
    shutil.rmtree(tmp_path / "data")
    with pytest.warns(UserWarning, match="could not be checked whole: no examples of rte/train"):
        assert run(finished, tmp_path / "out") == result
    write_rows(tmp_path / "data")
    assert len(run(broken, tmp_path / "out")["seconds_per_epoch"]) == 2


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("scores", {"validation": {"accuracy": "all"}}, "it lacks scores.validation.count"),
        ("scores", 3, "scores is 3"),
        ("processes", 0, "processes is 0"),
        ("loss_per_step", [1.0] * 3, "3 losses and 2 times are not those of 10 steps, 5 an epoch"),
        ("data", {}, "it lacks data.train, data.validation"),
        ("config", {"task": "rte"}, "config: it lacks abm_batch_size"),
        ("schema", "glue-2", "has schema 'glue-2', this version reads 'glue-3'"),
    ],
)
def test_a_field_of_a_result_that_is_no_good(finished, base, tmp_path, place, value, message):
    folder = shutil.copytree(finished[0]["folder"], tmp_path / Path(finished[0]["folder"]).name)
    content = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**content, place: value}))
    with pytest.raises(ValueError, match=rf"result\.json.*{message}.*move its folder away"):
        run(small(base), tmp_path)


@pytest.mark.parametrize("file", ["notes.json", "progress.json"])
@pytest.mark.parametrize("text", ["{", "[]", '{"losses": 3, "seconds": [], "origin": 3}'])
def test_notes_of_an_interrupted_run_that_are_no_good(broken_off, base, file, text):
    out = broken_off
    path = next(out.rglob(file))
    before = path.read_text()
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{file}.*--rerun, or deleting its folder, starts afresh"):
        run(small(base, init="kaiming"), out)
    path.write_text(before)


@pytest.fixture(scope="module")
def broken_off(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        die_after_an_epoch(small(base, init="kaiming"), out, patch)
    return out


def test_weights_that_are_not_finite_are_named(base, tmp_path, capsys):
    model = T5ForConditionalGeneration.from_pretrained(base).requires_grad_(False)
    model.decoder.block[0].layer[2].DenseReluDense.wi.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    assert main([f"--model={tmp_path / 'model'}", "--data=synthetic", f"--out={tmp_path}", "--quiet"]) == 2
    assert "decoder.block.0.layer.2.DenseReluDense.wi.weight hold NaN" in capsys.readouterr().err


def test_flags_without_use_are_refused(tmp_path, capsys):
    assert main(["--init=kaiming", "--abm-steps=3", f"--out={tmp_path}"]) == 2
    assert "abm_steps is given, but init kaiming has no use for it" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "rtee"}, "unknown task 'rtee'; .*did you mean rte"),
        ({"warmup": 1.0}, "warmup is 1.0; it must lie in"),
        ({"source_tokens": 2}, "source_tokens is 2; it must be 8 or more"),
        ({"train_examples": -1}, "train_examples is -1"),
        ({"init": "nothing"}, "nothing"),
        ({"preset": "slow"}, "preset.*quick"),
        ({"qkv": "qv"}, "unknown settings qkv"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GlueConfig.make(**settings)


def test_the_paper_preset_is_the_reference_recipe():
    config = GlueConfig.make(preset="paper")
    assert (config.model, config.rank, config.alpha, config.dropout) == ("google-t5/t5-base", 8, 16.0, 0.05)
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay, config.warmup) == (8, 32, 1e-4, 0.01, 0.1)
    abm = config.init_config()
    assert (abm.layers, abm.margin, abm.samples, abm.batch_size, abm.steps) == (6, 0.5, 128, 1, 100)
    assert abm.learning_rate == 3e-4 and config.data_source == "hub" and config.train_examples == 0


def test_auto_data_depends_on_the_model_alone():
    assert GlueConfig.make().data_source == "synthetic"
    assert GlueConfig.make(model="google-t5/t5-small").data_source == "hub"


@pytest.mark.slow
def test_the_real_command(base, tmp_path):
    words = [sys.executable, "-m", "nlp_ext.glue", f"--model={base}", f"--out={tmp_path}", "--epochs=1", "--json"]
    words += [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items() if k != "epochs"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scores"]["validation"]["count"] == 12 and done.stderr == ""


def test_wrong_models(tmp_path, base, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert main([f"--model={empty}", "--data=synthetic", f"--out={tmp_path}", "--quiet"]) == 2
    assert f"the folder {empty} holds no model that can be read" in capsys.readouterr().err
    nothing = f"--data={tmp_path / 'nothing'}"  # the model is looked at before the data, and nothing is left behind
    assert main([f"--model={empty}", nothing, f"--out={tmp_path / 'runs'}", "--quiet"]) == 2
    assert "holds no model that can be read" in capsys.readouterr().err and not any((tmp_path / "runs").iterdir())
    config = json.loads((base / "config.json").read_text())
    (empty / "config.json").write_text(json.dumps({**config, "model_type": "llama", "architectures": None}))
    assert main([f"--model={empty}", "--data=synthetic", f"--out={tmp_path}", "--quiet"]) == 2
    assert "is a model of type llama; one like tiny-t5 is needed here" in capsys.readouterr().err


def test_weights_that_are_not_whole(tmp_path, base, capsys):
    """An encoder alone would get a random decoder; a file cut short is an error, too."""
    part, cut = tmp_path / "part", tmp_path / "cut"
    T5EncoderModel.from_pretrained(base).save_pretrained(part)
    ByT5Tokenizer().save_pretrained(part)
    shutil.copytree(base, cut)
    (cut / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:5000])
    for folder, message in ((part, r"lacks \d+ weights of a T5ForConditionalGeneration"), (cut, "cannot be read")):
        assert main([f"--model={folder}", "--data=synthetic", f"--out={tmp_path}", "--quiet"]) == 2
        error = capsys.readouterr().err
        assert re.search(message, error) and error.count("\n") == 1


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a gated and for a missing model."""

    def do_HEAD(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("some/gated", "some/gated is gated: accept its licence at https://huggingface.co/some/gated"),
        ("some/missing", "there is no model some/missing on the hub"),
        ("", "cannot be read from the hub"),
    ],
)
def test_hub_errors_are_one_message(name, message, tmp_path, monkeypatch, capsys):
    server = HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    if not name:  # nobody answers there, however often it is asked
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        server.shutdown()
        server.server_close()
    address = f"http://127.0.0.1:{port}"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + template)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    words = ["--model", name or "some/model", "--data=synthetic", f"--out={tmp_path}"]
    code, _, err = answer(words, capsys, main)
    server.shutdown()  # a server that is closed while it serves would spin until the end of all tests
    server.server_close()
    assert code == 2 and message in err and err.count("\n") == 1
