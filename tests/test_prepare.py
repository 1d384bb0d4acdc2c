"""Preparing data sets with the official builders, and exporting any source to image folders.

Nothing but the download and the parsing of raw files is replaced: the builders get generated examples.
"""

import json
import shutil
from collections import namedtuple

import numpy as np
import pytest
from official import SIZE, as_tfds, make_examples, small_edition, write_official
from PIL import Image

import vtab_tasks
from abm_vision.vtab.__main__ import main
from vtab_tasks import prepare as module
from vtab_tasks.export import export
from vtab_tasks.prepare import prepare


@pytest.fixture
def small(monkeypatch):
    """All tasks in small editions."""
    for name, task in list(vtab_tasks.TASKS.items()):
        monkeypatch.setitem(vtab_tasks.TASKS, name, small_edition(task))


@pytest.fixture
def readers(monkeypatch):
    """As if the packages that read raw files were there: the tests replace what uses them."""
    monkeypatch.setattr(module, "_READERS", {})


@pytest.fixture
def generated(monkeypatch):
    """Official builders that get generated examples. Returns a function: how to break off after some examples."""
    tfds = pytest.importorskip("tensorflow_datasets")
    limit = {"after": None}

    def use(name, splits):
        official = tfds.builder_cls(name)

        def generate(self, *_, **__):
            made = make_examples(self.info.features, SIZE, 0)
            return {split: broken_off(made) for split in splits}

        monkeypatch.setattr(official, "_split_generators", generate)

    def broken_off(made):
        for key, example in as_tfds(made):
            if key == limit["after"]:
                raise KeyboardInterrupt
            yield key, example

    use("dsprites", ["train"])
    use("smallnorb", ["train", "test"])
    return limit


def test_data_sets_are_prepared_once(tmp_path, small, readers, generated):
    lines = []
    tasks = ["dsprites_loc", "snorb_azim", "dsprites_ori"]
    folders = prepare(tasks, tmp_path, say=lines.append)
    assert folders == [tmp_path / "dsprites" / "2.0.0", tmp_path / "smallnorb" / "2.0.0"]
    assert "to download: dsprites 0.03 GB, smallnorb 0.26 GB; disk needed about 0.9 GB" in lines[0]
    assert [line.split(":")[0] for line in lines[1:]] == ["dsprites", "dsprites", "smallnorb", "smallnorb"]
    assert len(vtab_tasks.load("dsprites_ori", "test", source="tfds", data_dir=tmp_path)) == 9
    stamp = (folders[0] / "dataset_info.json").stat().st_mtime_ns
    again = []
    assert prepare(tasks, tmp_path, say=again.append) == folders
    assert all(": there, " in line for line in again)
    assert (folders[0] / "dataset_info.json").stat().st_mtime_ns == stamp


def test_a_killed_preparation_goes_on(tmp_path, small, readers, generated):
    generated["after"] = 10
    with pytest.raises(KeyboardInterrupt):
        prepare(["dsprites_loc"], tmp_path, say=lambda line: None)
    left = tmp_path / "dsprites" / "incomplete.ABCDEF_2.0.0"  # what kill -9 leaves behind
    left.mkdir()
    assert vtab_tasks.locate("dsprites_loc", tmp_path) == [("rendered", None)]
    generated["after"] = None
    assert prepare(["dsprites_loc"], tmp_path, say=lambda line: None) == [tmp_path / "dsprites" / "2.0.0"]
    assert not left.exists()


def test_two_do_not_prepare_the_same(tmp_path, small, readers, generated):
    (tmp_path / "dsprites").mkdir()
    with module.FileLock(tmp_path / "dsprites" / "prepare.lock"):
        with pytest.raises(OSError, match="another process is preparing dsprites"):
            prepare(["dsprites_loc"], tmp_path, say=lambda line: None)


def test_prepared_data_of_another_size_are_refused(tmp_path, readers, generated):
    with pytest.raises(ValueError, match="has 30 in 'train'; the official data have 737280"):
        prepare(["dsprites_loc"], tmp_path, say=lambda line: None)


def test_too_little_disk(tmp_path, small, readers, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(10e9))
    with pytest.raises(
        OSError, match=r"too little disk space.*clevr 19\.02 GB; disk needed about 57\.1 GB, free 10\.0 GB"
    ):
        prepare(["clevr_dist"], tmp_path / "new", say=lambda line: None)
    assert not (tmp_path / "new").exists()


def test_all_that_is_to_be_fetched_by_hand_is_told_at_once(tmp_path, readers):
    with pytest.raises(FileNotFoundError, match=r"leave these tasks out\.\nresisc45: .*\nretinopathy: "):
        prepare(list(vtab_tasks.TASKS), tmp_path, say=lambda line: None)


@pytest.mark.parametrize(
    ("task", "files", "missing"),
    [
        ("resisc45", ["NWPU-RESISC45/airplane/1.jpg"], "NWPU-RESISC45/wetland"),
        ("retinopathy", ["sample/a.jpeg", "train/1_left.jpeg", "trainLabels.csv"], "test/"),
    ],
)
def test_files_to_be_fetched_by_hand(tmp_path, readers, task, files, missing):
    for name in files:
        (tmp_path / "downloads/manual" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "downloads/manual" / name).touch()
    with pytest.raises(FileNotFoundError, match="what a program cannot download") as caught:
        prepare(["dtd", task], tmp_path, say=lambda line: None)
    message = str(caught.value)
    assert str(tmp_path / "downloads/manual") in message and vtab_tasks.get_task(task).url in message
    assert missing in message.partition("missing: ")[2] and files[0] not in message.partition("missing: ")[2]


def test_a_missing_package_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_READERS", {"no_such_reader": "no_such_reader (kitti)"})
    assert main(["prepare", "--task", "kitti_dist", "--data-dir", str(tmp_path)]) == 2
    assert 'needs no_such_reader (kitti): pip install "abm-lora[prepare]"' in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["DownloadError", "ConnectionError"])
def test_a_failed_download(tmp_path, small, readers, monkeypatch, kind):
    tfds = pytest.importorskip("tensorflow_datasets")
    requests = pytest.importorskip("requests")

    def fail(self, *a, **k):
        raise (tfds.download.DownloadError if kind == "DownloadError" else requests.ConnectionError)("404")

    monkeypatch.setattr(tfds.builder_cls("dtd"), "_split_generators", fail)
    with pytest.raises(OSError, match=r"dtd could not be downloaded \(404\).*run the same again"):
        prepare(["dtd"], tmp_path, say=lambda line: None)


# ---- image folders -------------------------------------------------------------------------------


@pytest.fixture
def norb(tmp_path, small):
    write_official("smallnorb", tmp_path / "tfds")
    return tmp_path / "tfds"


def test_export_keeps_pixels_labels_and_origin(norb, tmp_path):
    folder = export("snorb_elev", tmp_path / "out", source="tfds", data_dir=norb, show_progress_bar=False)
    assert folder == tmp_path / "out" / "vtab-1k" / "smallnorb_ele"
    for split in vtab_tasks.SPLITS:
        data = vtab_tasks.load("snorb_elev", split, source="tfds", data_dir=norb)
        written = vtab_tasks.load("snorb_elev", split, source="folder", data_dir=tmp_path / "out")
        assert written.labels.tolist() == data.labels.tolist()
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(data, written, strict=True))
        assert written.source == "folder" and "written as PNG from tfds" in written.description
    with Image.open(folder / "images/test/000000.png") as image:
        assert image.format == "PNG"
    assert not list(folder.rglob(".*"))


def test_export_goes_on_where_it_was_killed(norb, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real, count = vtab_tasks.TaskData.images, iter(range(3))

    def killed(self, indices):
        if next(count) == 2:
            raise KeyboardInterrupt
        return real(self, indices)

    monkeypatch.setattr("vtab_tasks.export.CHUNK", 3)
    monkeypatch.setattr(vtab_tasks.TaskData, "images", killed)
    with pytest.raises(KeyboardInterrupt):
        export("snorb_azim", out, source="tfds", data_dir=norb, show_progress_bar=False)
    assert vtab_tasks.locate("snorb_azim", out) == [("rendered", None)]
    written = {p: p.stat().st_mtime_ns for p in out.rglob("*.png")}
    assert len(written) == 6
    monkeypatch.setattr(vtab_tasks.TaskData, "images", real)
    export("snorb_azim", out, source="tfds", data_dir=norb, show_progress_bar=False)
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in written.items())
    assert len(vtab_tasks.load("snorb_azim", "test", source="folder", data_dir=out)) == 9


def test_export_does_not_mix_origins(norb, tmp_path):
    out = tmp_path / "out"
    folder = export("snorb_azim", out, source="tfds", data_dir=norb, splits=["val200"], show_progress_bar=False)
    (folder / "origin.json").write_text(json.dumps({"source": "rendered"}))
    with pytest.raises(ValueError, match="give another folder"):
        export("snorb_azim", out, source="tfds", data_dir=norb, show_progress_bar=False)
    (folder / "origin.json").unlink()  # the community's
    with pytest.raises(ValueError, match="of unknown origin"):
        export("snorb_azim", out, source="tfds", data_dir=norb, show_progress_bar=False)


def test_rendered_images_stay_rendered_in_a_folder(tmp_path, small):
    assert (
        main(["prepare", "--task", "dsprites_loc", "--to", "folder", "--source", "rendered", "--out", str(tmp_path)])
        == 0
    )
    data = vtab_tasks.load("dsprites_loc", "test", source="folder", data_dir=tmp_path)
    assert data.source == "rendered" and "not the official pixel data" in data.description


def test_a_damaged_origin_is_told(tmp_path, small):
    folder = export("dsprites_loc", tmp_path, source="rendered", splits=["val200"], show_progress_bar=False)
    (folder / "origin.json").write_text("{")
    with pytest.raises(ValueError, match=r"origin\.json does not tell where the images came from"):
        vtab_tasks.load("dsprites_loc", "val200", source="folder", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "dsprites_lok"], "did you mean dsprites_loc"),
        (["--task", "all", "--to", "folder"], "needs --out"),
        (["--task", "dtd", "--out", "x"], "go with --to folder"),
        (["--task", "dtd", "--to", "folder", "--out", "x", "--manual-dir", "y"], "goes with --to tfds"),
        (["--task", "dtd", "--to", "folder", "--out", "x", "--source", "rendered"], "dtd has no rendered form"),
        ([], "--task"),
    ],
)
def test_bad_words(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["prepare", *words])
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err and not list(tmp_path.iterdir())
