"""Preparing datasets with the official builders, and exporting any source to image folders.

Nothing but the download and the parsing of raw files is replaced: the builders get generated examples.
"""

import json
import os
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
    pytest.importorskip("tensorflow_datasets")
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
    assert all(": already prepared, " in line for line in again)
    assert (folders[0] / "dataset_info.json").stat().st_mtime_ns == stamp


def test_a_killed_preparation_goes_on(tmp_path, small, readers, generated):
    generated["after"] = 10
    with pytest.raises(KeyboardInterrupt):
        prepare(["dsprites_loc"], tmp_path, say=lambda line: None)
    left = tmp_path / "dsprites" / "incomplete.ABCDEF_2.0.0"  # what kill -9 leaves behind
    left.mkdir()
    others = [tmp_path / "downloads" / name for name in ("a.npz.tmp.0123", "extracted/ZIP.incomplete_0123_a")]
    for other in others:
        other.mkdir(parents=True)
    assert vtab_tasks.locate("dsprites_loc", tmp_path) == [("rendered", None)]
    generated["after"] = None
    assert prepare(["dsprites_loc"], tmp_path, say=lambda line: None) == [tmp_path / "dsprites" / "2.0.0"]
    assert not left.exists() and not any(other.exists() for other in others)


def test_two_do_not_prepare_the_same(tmp_path, small, readers, generated):
    with module.FileLock(tmp_path / "prepare.lock"):
        with pytest.raises(OSError, match="another process is preparing datasets in"):
            prepare(["dsprites_loc"], tmp_path, say=lambda line: None)


def test_prepared_data_of_another_size_are_refused(tmp_path, readers, generated):
    with pytest.raises(ValueError, match="has 30 in 'train'; the official data have 737280"):
        prepare(["dsprites_loc"], tmp_path, say=lambda line: None)
    with pytest.raises(
        ValueError, match=r"2\.0\.0 exists but cannot be used: .*737280.*Delete it and run the same command again"
    ):
        prepare(["dsprites_loc"], tmp_path, say=lambda line: None)


def test_a_folder_that_is_not_whole_is_named(tmp_path, small, readers, generated):
    (tmp_path / "dsprites" / "2.0.0").mkdir(parents=True)
    with pytest.raises(FileExistsError, match=r"2\.0\.0 has no dataset_info\.json.*delete it"):
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
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(module, "_READERS", {"no_such_reader": "no_such_reader (kitti)"})
    assert main(["prepare", "--task", "kitti_dist", "--data-dir", str(tmp_path)]) == 2
    assert 'needs no_such_reader (kitti): pip install -e ".[prepare]"' in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["DownloadError", "ConnectionError", "NonMatchingChecksumError", "ExtractError"])
def test_a_failed_preparation(tmp_path, small, readers, monkeypatch, capsys, kind):
    tfds = pytest.importorskip("tensorflow_datasets")
    requests = pytest.importorskip("requests")
    from tensorflow_datasets.core.download import download_manager, extractor

    kinds = {
        "DownloadError": tfds.download.DownloadError("404"),
        "ConnectionError": requests.ConnectionError("404"),
        "NonMatchingChecksumError": download_manager.NonMatchingChecksumError("404", "path"),
        "ExtractError": extractor.ExtractError("404"),
    }

    def fail(self, *a, **k):
        raise kinds[kind]

    monkeypatch.setattr(tfds.builder_cls("dtd"), "_split_generators", fail)
    assert main(["prepare", "--task", "dtd", "--data-dir", str(tmp_path)]) == 2
    assert f"dtd could not be downloaded and prepared ({kind}: " in (err := capsys.readouterr().err)
    assert "404" in err and "run the same command again" in err


def test_an_interrupt_while_files_are_unpacked_is_one(tmp_path, small, readers, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download import extractor

    def fail(self, *a, **k):
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise extractor.ExtractError("while unpacking") from error

    monkeypatch.setattr(tfds.builder_cls("dtd"), "_split_generators", fail)
    assert main(["prepare", "--task", "dtd", "--data-dir", str(tmp_path)]) == 130


def test_disk_counts_what_is_there_and_what_came_by_hand(tmp_path, readers):
    pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.core.download.resource import get_dl_fname

    task = vtab_tasks.get_task("snorb_azim")
    builder = module._builder(module.source.import_tfds(), task, tmp_path)
    manual = tmp_path / "downloads" / "manual"
    before = module._need(builder, task, tmp_path, manual)
    assert before.disk == 3 * before.download
    url, info = max(builder.url_infos.items(), key=lambda item: item[1].size)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / get_dl_fname(url, info.checksum)).write_bytes(b"x" * 1000)
    after = module._need(builder, task, tmp_path, manual)
    assert (before.download - after.download, before.disk - after.disk) == (1000, 1000)
    resisc = vtab_tasks.get_task("resisc45")
    for name in ("airplane", "wetland"):
        (manual / "NWPU-RESISC45" / name).mkdir(parents=True)
        (manual / "NWPU-RESISC45" / name / "1.jpg").write_bytes(b"x" * 50_000_000)
    assert (
        module._need(module._builder(module.source.import_tfds(), resisc, tmp_path), resisc, tmp_path, manual).disk
        >= 1e8
    )
    dsprites = vtab_tasks.get_task("dsprites_loc")
    need = module._need(module._builder(module.source.import_tfds(), dsprites, tmp_path), dsprites, tmp_path, manual)
    assert need.disk > 7e8  # 737,280 records of some 500 bytes, written twice


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


@pytest.mark.parametrize("out", ["vtab-1k", "vtab-1k/", "data/vtab-1k", "."])
def test_a_folder_of_that_name_is_not_nested(norb, tmp_path, monkeypatch, out):
    inside = tmp_path / "vtab-1k"
    inside.mkdir()
    monkeypatch.chdir(inside if out == "." else tmp_path)
    words = ["prepare", "--task", "snorb_elev", "--to", "folder", "--source", "tfds", "--data-dir", str(norb)]
    assert main([*words, "--out", out, "--quiet"]) == 0
    (written,) = tmp_path.rglob("smallnorb_ele")
    assert written == (tmp_path / "data" if out.startswith("data") else tmp_path) / "vtab-1k" / "smallnorb_ele"
    for place in (written.parent, written.parents[1]):
        assert vtab_tasks.load("snorb_elev", "test", source="folder", data_dir=place).location == str(written)


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
    next(iter(written)).unlink()  # lost afterwards: exporting again brings it back
    export("snorb_azim", out, source="tfds", data_dir=norb, show_progress_bar=False)
    assert next(iter(written)).is_file()


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


def test_export_below_its_own_source(norb, tmp_path):
    """Half an export must not be taken for where its images come from."""
    export("snorb_azim", norb, data_dir=norb, splits=["val200"], show_progress_bar=False)
    with pytest.raises(ValueError, match=r"is to be written, and is below data_dir .* too: name another --source"):
        export("snorb_azim", norb, data_dir=norb, show_progress_bar=False)
    folder = export("snorb_azim", norb, source="tfds", data_dir=norb, show_progress_bar=False)
    assert (folder / "test.txt").exists()


def test_export_goes_on_from_a_relative_path_and_is_readable_by_others(norb, tmp_path, monkeypatch):
    out = tmp_path / "out"
    folder = export("snorb_azim", out, source="tfds", data_dir=norb, splits=["val200"], show_progress_bar=False)
    monkeypatch.chdir(norb.parent)
    export("snorb_azim", out, source="tfds", data_dir=norb.name, show_progress_bar=False)
    umask = os.umask(0)
    os.umask(umask)
    assert all(p.stat().st_mode & 0o777 == 0o666 & ~umask for p in folder.rglob("*") if p.is_file())


def test_export_does_not_mix_two_drawings(tmp_path, small, monkeypatch):
    export("dsprites_loc", tmp_path, source="rendered", splits=["val200"], show_progress_bar=False)
    monkeypatch.setattr("vtab_tasks.export.drawing", lambda task: "another")
    with pytest.raises(ValueError, match="give another folder"):
        export("dsprites_loc", tmp_path, source="rendered", show_progress_bar=False)


def test_a_damaged_origin_is_told(tmp_path, small):
    folder = export("dsprites_loc", tmp_path, source="rendered", splits=["val200"], show_progress_bar=False)
    (folder / "origin.json").write_text("{")
    with pytest.raises(ValueError, match=r"origin\.json does not record where the images came from"):
        vtab_tasks.load("dsprites_loc", "val200", source="folder", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"origin\.json is damaged"):
        export("dsprites_loc", tmp_path, source="rendered", show_progress_bar=False)


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
