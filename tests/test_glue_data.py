"""Examples in GLUE's columns, from files of every kind, and what is wrong with some."""

import json

import pytest

from nlp_ext.glue.data import read
from nlp_ext.glue.synthetic import examples
from nlp_ext.glue.tasks import TASKS, get_task

datasets = pytest.importorskip("datasets")
ROWS = [{"sentence1": f"a {k}", "sentence2": 'b, "c"', "label": k % 2, "idx": k} for k in range(5)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = datasets.Dataset.from_list(rows)
    {".json": table.to_json, ".jsonl": table.to_json, ".csv": table.to_csv, ".parquet": table.to_parquet}[path.suffix](
        path
    )


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("below", ["", "rte"])
def test_local_files(tmp_path, ending, below):
    write(tmp_path / below / f"train{ending}", ROWS)
    assert read(get_task("rte"), "train", tmp_path).to_list() == ROWS


def test_a_changed_file_is_read_anew_and_positions_are_added(tmp_path):
    for label in (0, 1):
        (tmp_path / "validation.jsonl").write_text(json.dumps({"sentence": "x", "label": label, "more": 3}) + "\n")
        assert read(get_task("sst2"), "validation", tmp_path).to_list() == [{"sentence": "x", "label": label, "idx": 0}]


def test_labels_of_test_splits_are_not_asked_for(tmp_path):
    write(tmp_path / "test.csv", [{**row, "label": -1} for row in ROWS])
    assert len(read(get_task("rte"), "test", tmp_path)) == 5


@pytest.mark.parametrize("name", TASKS)
def test_synthetic(name):
    split = TASKS[name].validation[0]
    assert read(TASKS[name], split, "synthetic").to_list() == examples(name, split)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence1": "a", "label": 0}], "has the columns sentence1, label; rte needs sentence2 as well"),
        ([{**ROWS[0], "label": 2}], r"train.jsonl:1: rte has the label 2; allowed are 0 \(entailment\)"),
        ([ROWS[0], {**ROWS[0], "label": None}], "train.jsonl:2: the label is None; a number is needed"),
        ([{**ROWS[0], "label": "entailment"}], "train.jsonl:1: the label is 'entailment'; a number is needed"),
        ([{**ROWS[0], "sentence1": ["a"]}], r"train.jsonl:1: sentence1 is \['a'\]; a text is needed"),
        ([ROWS[0], {**ROWS[0], "idx": "x"}], "train.jsonl:2: idx is 'x'; a whole number is needed"),
        ([ROWS[0], {"sentence1": "a", "sentence2": "b", "label": 0}], "train.jsonl:2 has the columns .* needs idx as"),
        ([], "train.jsonl is empty"),
    ],
)
def test_files_that_are_something_else(tmp_path, rows, message):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        read(get_task("rte"), "train", tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no examples of rte/train in .*train.json, train.jsonl, train.csv"):
        read(get_task("rte"), "train", tmp_path)
    with pytest.raises(ValueError, match="mnli has no split 'validation'; there are train, validation_matched"):
        read(get_task("mnli"), "validation", tmp_path)
    (tmp_path / "train.json").write_text("{ no json")
    with pytest.raises(ValueError, match=r"train\.json:1 is not JSON"):
        read(get_task("rte"), "train", tmp_path)


def test_words_of_csv_stay_words(tmp_path):
    (tmp_path / "train.csv").write_text("sentence,label\nNA,1\nNone,0\n")
    assert read(get_task("sst2"), "train", tmp_path)["sentence"][:] == ["NA", "None"]


def test_texts_are_texts_and_test_labels_are_not_needed(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"sentence": "a", "label": 1}\n{"sentence": null, "label": 0}')
    with pytest.raises(ValueError, match=r"train.jsonl:2: sentence is None; a text is needed"):
        read(get_task("sst2"), "train", tmp_path)
    (tmp_path / "test.jsonl").write_text('{"sentence": "a"}')
    assert read(get_task("sst2"), "test", tmp_path).to_list() == [{"sentence": "a", "label": -1, "idx": 0}]


def test_texts_stay_as_they_are(tmp_path):
    """Those that look like dates or numbers too."""
    for ending, text in ((".csv", "sentence,label\n2020-01-01,1\n12,0\n"), (".jsonl", None)):
        rows = [{"sentence": "2020-01-01", "label": 1}, {"sentence": "12", "label": 0}]
        path = tmp_path / ending[1:] / f"train{ending}"
        path.parent.mkdir()
        path.write_text(text or "".join(json.dumps(row) + "\n" for row in rows))
        assert read(get_task("sst2"), "train", path.parent)["sentence"][:] == ["2020-01-01", "12"]


def test_no_hub(monkeypatch):
    def fail(*a, **k):
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(OSError, match=r"cannot be read from the hub \(no route\): give local files with --data DIR"):
        read(get_task("rte"), "train")
