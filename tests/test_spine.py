"""A harness of one's own on the spine: a network of two layers on a table of numbers."""

import csv
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from abm_vision import Backbone, add_lora, register_backbone
from abm_vision.abm import host
from abm_vision.runs import checkpoint as checkpoints
from abm_vision.runs.commands import commands_of, main
from abm_vision.runs.content import initialisation
from abm_vision.runs.folder import CHECKPOINT, Busy, Kept, locked
from abm_vision.runs.harness import Harness, Prepared, Processes, Session
from abm_vision.runs.records import Positive, Result, Share
from abm_vision.runs.run import run
from abm_vision.runs.settings import AdapterSettings, flag
from abm_vision.runs.view import Data, Kind, Score, View


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5))


HOST = Backbone(
    name="table",
    matches=lambda model: isinstance(model, Net),
    target_modules={"mlp": "0|2"},
    boundary_modules={"layers": "1"},
    forward_fn=lambda model, batch: model(batch[0]),
    loss_fn=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
)


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_backbone(HOST)
    yield
    host._registered.remove(HOST)


@dataclass(frozen=True)
class TableConfig(AdapterSettings):
    schema: ClassVar[str] = "table-1"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"quick": {}}

    model: str = flag("net", "name of the network")
    rows: int = flag(96, "rows of the table")
    rank: int = flag(2, "r of both layers")
    epochs: int = flag(4, "training epochs")
    batch_size: int = flag(32, "rows in a step")
    abm_samples: int = flag(16, "rows for the initialisation")

    @property
    def subject(self):
        return "table"


class TableResult(Result):
    accuracy: Share
    rows: Positive
    data: dict[str, Any]
    weights: dict[str, Any]
    processes: Positive


@dataclass(kw_only=True)
class TableRun(Prepared):
    table: torch.Tensor
    labels: torch.Tensor

    def select(self, indices):
        return self.table[indices], self.labels[indices]


def prepare(run):
    with run.stage("data"):
        table = torch.randn(run.config.rows, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = add_lora(Net().to(run.device), run.config.rank, run.config.alpha)
    origin = {name: value for part in origin_parts(run.config) for name, value in part().items()}
    labels = table[:, :5].argmax(1)
    return TableRun(
        **vars(run), model=model, samples=len(table), origin=origin, weights_sha256=None, table=table, labels=labels
    )


def origin_parts(config):
    return [partial(table_content, config.rows), partial(initialisation, config)]


def table_content(rows):
    return {"table": f"{rows} rows"}


def train(run, notes, checkpoint):
    optimiser = torch.optim.AdamW([p for p in run.model.parameters() if p.requires_grad], lr=run.config.lr)
    progress = checkpoints.restore(run, optimiser, checkpoint)
    while progress.epoch < run.config.epochs:
        for indices in torch.arange(run.samples).split(run.config.batch_size):
            loss = HOST.loss_fn(run.model, run.select(indices))
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            progress.losses.append(loss.item())
        progress.seconds.append(0.5)
        progress.epoch += 1
        checkpoints.save(run, optimiser, progress, notes)
        run.session.say(f"epoch {progress.epoch}")
    return progress


def score(run, progress):
    with torch.no_grad():
        correct = run.model(run.table).argmax(1) == run.labels
    data = {"train": {"source": "table"}, "test": {"source": "table"}}
    accuracy, weights = correct.float().mean().item(), {"sha256": None}
    return {
        "accuracy": accuracy,
        "rows": len(correct),
        "data": data,
        "weights": weights,
        "processes": run.processes.count,
    }


def write_notice(run):
    (run.folder / "notice.txt").write_text(run.config.run_name())


HARNESS = Harness(
    kept=Kept(TableConfig, TableResult, unfinished=(CHECKPOINT,)),
    prepare=prepare,
    origin=origin_parts,
    resume=checkpoints.load,
    train=train,
    score=score,
    summary=lambda result: f"accuracy {result['accuracy']:.2f}",
    card=lambda result: "A table.",
    settings=lambda result: {"accuracy": result["accuracy"]},
    extras={"notice.txt": write_notice},
)

VIEW = View(  # that of View's own example
    program="abm-table",
    name="Tables",
    kept=HARNESS.kept,
    harness=f"{__name__}:HARNESS",
    score=Score("accuracy", "accuracy", "test", value=lambda result: result["accuracy"], unit="%", scale=100.0),
    data=Data(
        kinds=(Kind("real", "Tables", tasks=("table",)),),
        source=lambda result: result["data"]["test"]["source"],
        counted=lambda result: (result["rows"], result["rows"]),
        samples="rows",
    ),
    task=lambda config: "table",
)


def test_a_view_gives_its_commands(tmp_path, capsys):
    words = ["--init", "kaiming,gaussian", "--lr", "1e-2", "--seeds", "2", "--out", str(tmp_path), "--device", "cpu"]
    commands = commands_of(VIEW, "Train a network on a table.", {})
    for line in (["compare", *words], ["report", str(tmp_path)]):
        assert main(VIEW, commands, line, smaller="--rows") == 0
    shown = capsys.readouterr()
    results = [json.loads(path.read_text()) for path in tmp_path.glob("*/result.json")]
    rows = {row["init"]: row for row in csv.DictReader((tmp_path / "compare.csv").open())}
    means = []
    for init in ("kaiming", "gaussian"):
        accuracy = [result["accuracy"] for result in results if result["config"]["init"] == init]
        means.append(sum(accuracy) / 2)
        assert len(accuracy) == 2 and float(rows[init]["accuracy"]) == pytest.approx(means[-1])
    table, (ours, others) = re.sub(" +", " ", shown.out), (f"{100 * mean:.1f} ± [0-9.]+" for mean in means)
    assert re.search(rf"\| table \| {ours} \| {others} \|", table)
    assert "table [table], 2 seeds\n" in table and "## Tables, test accuracy in %" in table
    assert "kaiming lr 0.01 seed 1: accuracy " in table and shown.err == ""


def adapter(result):
    return load_file(Path(result["folder"]) / "adapter" / "adapter_model.safetensors")


def same(a, b):
    tensors = adapter(a), adapter(b)
    return tensors[0].keys() == tensors[1].keys() and all(torch.equal(tensors[0][n], tensors[1][n]) for n in tensors[0])


def heard(**options):
    """A session, and the lines it is given."""
    lines = []
    return Session(**options, say=lines.append), lines


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    session, lines = heard(out=tmp_path_factory.mktemp("finished"))
    return run(HARNESS, TableConfig(), session), lines


def test_a_run_leaves_its_result_and_an_adapter_and_nothing_half_done(finished):
    result, lines = finished
    folder = Path(result["folder"])
    names = {".lock", "adapter", "config.json", "curves.png", "result.json"}
    assert {path.name for path in folder.iterdir()} == names and folder.name.startswith("table-abm-seed0-")
    assert {**json.loads((folder / "result.json").read_text()), "folder": str(folder)} == result
    assert [line.split()[0] for line in lines] == ["device", "abm", *["epoch"] * 4, "abm"]
    cost = re.fullmatch(r"abm +\d+\.\d s, as long as (\S+) epoch \((\S+) training steps\)", lines[-1])
    epoch = sum(result["seconds_per_epoch"]) / 4
    assert float(cost[1]) == pytest.approx(result["seconds"]["init"] / epoch, abs=0.006)
    steps = len(result["loss_per_step"]) / 4
    assert float(cost[2]) == pytest.approx(steps * result["seconds"]["init"] / epoch, abs=0.06)
    assert result["seconds"]["train"] == 2.0 and {"data", "init"} < set(result["seconds"])
    assert result["abm"]["after"]["match"] > 0.5 and not result["reference_only"]
    assert len(result["loss_per_step"]) == 12 and result["loss_per_step"][-1] < result["loss_per_step"][0]


def test_a_finished_run_is_read(finished):
    result, _ = finished
    session, lines = heard(out=Path(result["folder"]).parent)
    assert run(HARNESS, TableConfig(), session) == result
    assert [line.split(";")[0] for line in lines] == ["finished before"]


@pytest.mark.parametrize("init", ["abm", "pissa"])  # the second changes base weights too
def test_an_interrupted_run_is_resumed_with_the_same_result(tmp_path, init):
    def say(line):
        if line == "epoch 2":
            raise KeyboardInterrupt

    config = TableConfig(init=init)
    whole = run(HARNESS, config, Session(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        run(HARNESS, config, Session(tmp_path / "broken", say=say))
    assert (tmp_path / "broken" / config.run_name() / "checkpoint.pt").is_file()
    session, lines = heard(out=tmp_path / "broken")
    resumed = run(HARNESS, config, session)
    epochs = [line for line in lines if line.startswith("epoch")]
    assert "resumed   after epoch 2 of 4" in lines and epochs == ["epoch 3", "epoch 4"]
    assert resumed["loss_per_step"] == whole["loss_per_step"] and same(resumed, whole)


def test_rerun_and_extras(tmp_path):
    first = run(HARNESS, TableConfig(init="kaiming"), Session(tmp_path, extras=("notice.txt",)))
    notice = Path(first["folder"]) / "notice.txt"
    assert notice.read_text() == TableConfig(init="kaiming").run_name()
    session, lines = heard(out=tmp_path, rerun=True)
    again = run(HARNESS, TableConfig(init="kaiming"), session)
    assert same(again, first) and lines[0].startswith("device") and not notice.exists()
    run(HARNESS, TableConfig(init="kaiming"), Session(tmp_path, extras=("notice.txt",)))
    assert notice.is_file()


def test_diagnosis_of_a_new_and_of_a_finished_run(tmp_path):
    config = TableConfig(init="lora_ga")
    new = run(HARNESS, config, Session(tmp_path / "new", diagnose=True))
    assert run(HARNESS, config, Session(tmp_path / "old"))["information_loss"] is None
    added = run(HARNESS, config, Session(tmp_path / "old", diagnose=True))
    for moment in ("before", "after", "after_on_seen"):
        assert added["information_loss"][moment]["layers"] == new["information_loss"][moment]["layers"]
    assert (Path(added["folder"]) / "information_loss.png").is_file()
    assert added["loss_per_step"] == new["loss_per_step"]


def test_a_reference_is_tuned_first_and_is_then_a_run_of_its_own(tmp_path):
    session, lines = heard(out=tmp_path)
    result = run(HARNESS, TableConfig(init="abm_tuned"), session)
    assert "reference tuned first, by the same run with init kaiming" in lines
    tuned = HARNESS.kept.read(Path(result["reference"]["folder"]))
    assert tuned["config"]["init"] == "kaiming" and tuned["reference_only"]
    seconds = tuned["seconds"]
    assert result["seconds"]["reference"] == pytest.approx(seconds["init"] + seconds["train"])
    own = run(HARNESS, TableConfig(init="kaiming"), session)
    assert not own["reference_only"] and own["loss_per_step"] == tuned["loss_per_step"]


def test_other_content_is_an_error(finished):
    out = Path(finished[0]["folder"]).parent
    changed = replace(HARNESS, origin=lambda config: [partial(dict, table="another")])
    with pytest.raises(ValueError, match=r"made with other content: table \(96 rows then, another now\)"):
        run(changed, TableConfig(), Session(out))


def test_a_run_that_another_process_makes_is_busy(finished):
    folder = Path(finished[0]["folder"])
    with locked(folder), pytest.raises(Busy, match="another process is at the run"):
        run(HARNESS, TableConfig(), Session(folder.parent))


def test_of_several_processes_the_first_alone_writes_and_speaks(tmp_path):
    config, calls = TableConfig(init="kaiming", epochs=1), []

    def of(rank):
        together = Processes(rank == 0, 2, lambda: calls.append(rank), lambda model: calls.append(model))
        return replace(HARNESS, processes=lambda config: together)

    def files():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    session, lines = heard(out=tmp_path)
    first = run(of(0), config, session)
    assert lines and calls.count(0) >= 4 and sum(isinstance(call, nn.Module) for call in calls) == 1
    before = files()
    session, lines = heard(out=tmp_path)
    assert run(of(1), config, session) == first and not lines and files() == before
    with pytest.raises(ValueError, match=r"made by another number of processes \(2 then, 1 now\)"):
        run(HARNESS, config, session)
