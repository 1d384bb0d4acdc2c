"""The three sources and the one interface in front of them.

TFDS data are written by the official dSprites builder in its own schema, only smaller, and read through the
real path. Expected images and labels are those that went in.
"""

import io
import json
import os
import pickle
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import vtab_tasks
from vtab_tasks.sources import rendered
from vtab_tasks.sources import tfds as tfds_source
from vtab_tasks.tasks import Edition, Part

ORI_LABELS = [b for b in range(16) for _ in range(3 if b % 2 == 0 else 2)]
SMALL = Edition((("train", 60),), Part("train", 0, 20), Part("train", 30, 35), Part("train", 40, 60))


@pytest.fixture(scope="module", autouse=True)
def own_folders(tmp_path_factory):
    """Neither the user's cache nor the user's TFDS data are touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("empty")))
        yield


@pytest.fixture
def small_tasks(monkeypatch):
    """The dSprites tasks with splits of 20, 5, 25 and 20 items."""
    for name in ("dsprites_loc", "dsprites_ori"):
        monkeypatch.setitem(vtab_tasks.TASKS, name, replace(vtab_tasks.get_task(name), editions=(SMALL,)))


# ---- rendered ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    return vtab_tasks.load("dsprites_loc", "train800val200", source="rendered")


def test_rendered_labels_are_the_official_ones(drawn):
    ori = vtab_tasks.load("dsprites_ori", "train800", source="rendered")
    assert drawn.labels[:5].tolist() == [0, 0, 7, 6, 7]
    assert ori.labels[:5].tolist() == [6, 8, 0, 7, 9]
    first_val = [220697, 85843, 84902]
    assert drawn.labels[800:803].tolist() == [row % 1024 // 32 // 2 for row in first_val]
    test = vtab_tasks.load("dsprites_ori", "test", source="rendered")
    first_test = [493443, 195884, 225768]
    assert test.labels[:3].tolist() == [ORI_LABELS[row // 1024 % 40] for row in first_test]


def test_rendered_says_what_it_is(drawn):
    assert (drawn.task.name, drawn.split) == ("dsprites_loc", "train800val200")
    assert (drawn.source, drawn.location) == ("rendered", None)
    assert "rendered" in drawn.description and "not the official pixel data" in drawn.description
    assert "\n" not in drawn.description


def test_rendered_items(drawn):
    assert len(drawn) == 1000
    image, label = drawn[3]
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3) and isinstance(label, int)
    assert set(np.unique(image)) == {0, 255}
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])
    batch = drawn.images([3, 999, 0])
    assert batch.dtype == np.uint8 and batch.shape == (3, 64, 64, 3) and np.array_equal(batch[0], image)
    assert np.array_equal(batch[1], drawn[-1][0])
    # The sprite's middle tells the label: 16 bins of two steps of 32/31 pixels, from pixel 16 on.
    squares = [i for i in range(300) if drawn.items.rows[i] < 6 * 40 * 1024]
    for i in squares:
        middle = np.nonzero(drawn[i][0][..., 0])[1].mean() + 0.5
        assert abs((middle - 16) * 31 / 32 - (2 * drawn[i][1] + 0.5)) < 1.0


def test_test_split_is_the_last_tenth():
    data = vtab_tasks.load("dsprites_loc", "test", source="rendered")
    train = vtab_tasks.load("dsprites_loc", "train800val200", source="rendered")
    assert len(data) == 73_728 and not set(data.items.rows.tolist()) & set(train.items.rows.tolist())
    assert np.bincount(data.labels).max() / len(data) == pytest.approx(0.064, abs=0.0005)


def test_a_task_without_a_scene_is_refused(monkeypatch):
    other = replace(vtab_tasks.get_task("dsprites_loc"), name="photos", tfds_name="photos")
    monkeypatch.setitem(vtab_tasks.TASKS, "photos", other)
    assert not rendered.can_draw(other) and vtab_tasks.locate("photos") == []
    with pytest.raises(ValueError, match="photos has no rendered form.*give data_dir"):
        vtab_tasks.load("photos", "test", source="rendered")
    with pytest.raises(FileNotFoundError, match="no data for photos") as caught:
        vtab_tasks.load("photos", "test")
    assert "rendered" not in str(caught.value)


# ---- TaskData ------------------------------------------------------------------------------------


def test_labels_are_those_of_the_items(drawn):
    assert drawn.labels.dtype == np.int64 and drawn.labels.shape == (1000,)
    assert [drawn[i][1] for i in range(0, 1000, 37)] == drawn.labels[::37].tolist()


def test_subset_is_decided_by_its_seed(drawn):
    some = drawn.subset(100, seed=3)
    assert len(some) == 100 and some.positions.tolist() == sorted(set(some.positions.tolist()))
    assert np.array_equal(some.positions, drawn.subset(100, seed=3).positions)
    assert not np.array_equal(some.positions, drawn.subset(100, seed=4).positions)
    assert np.array_equal(some.labels, drawn.labels[some.positions])
    assert np.array_equal(some[7][0], drawn[some.positions[7]][0])
    assert "100 of 1000 items, drawn with seed 3" in some.description
    assert np.array_equal(drawn.subset(1000, seed=3).labels, drawn.labels)
    inner = some.subset(10, seed=0)
    assert set(inner.positions.tolist()) <= set(some.positions.tolist())


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_subset_of_an_impossible_size(drawn, n):
    with pytest.raises(ValueError, match=f"cannot draw {n} items from .*: it has 1000"):
        drawn.subset(n, seed=0)


def test_sequence_protocol(drawn):
    part = drawn[10:20]
    assert len(part) == 10 and part[0][1] == drawn[10][1] and part.source == "rendered"
    assert sum(1 for _ in part) == 10
    for index in (1000, -1001):
        with pytest.raises(IndexError):
            drawn[index]
    with pytest.raises(TypeError):
        drawn["0"]
    with pytest.raises(IndexError):
        drawn.images([0, 1000])
    assert len(drawn.images([])) == 0


def test_rendered_can_be_pickled(drawn):
    again = pickle.loads(pickle.dumps(drawn.subset(50, seed=1)))
    assert again.task == drawn.task and np.array_equal(again.labels, drawn.subset(50, seed=1).labels)
    assert np.array_equal(again.images([0, 49]), drawn.subset(50, seed=1).images([0, 49]))


@pytest.mark.parametrize(
    ("task", "split", "options", "word"),
    [
        ("dsprites_loc", "test", {"source": "web"}, "unknown source 'web': choose one of auto, folder, tfds, rendered"),
        ("dsprites_loc", "test", {"source": "folder"}, "needs data_dir"),
        ("dsprites_loc", "validation", {}, "unknown split 'validation'"),
        ("dsprites_orientation", "test", {}, "did you mean dsprites_ori"),
    ],
)
def test_unknown_names(task, split, options, word):
    with pytest.raises(ValueError, match=word):
        vtab_tasks.load(task, split, **options)


# ---- folder --------------------------------------------------------------------------------------


def picture(i: int) -> np.ndarray:
    """An image that tells which one it is."""
    return np.full((64, 64, 3), (i, 2 * i, 255 - i), dtype=np.uint8)


def write_folder(folder, splits=("train800", "val200", "train800val200", "test")):
    """The community layout with small splits, as PNG so that pixels can be compared."""
    task = vtab_tasks.get_task("dsprites_loc")
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for i in range(task.size(split)):
            Image.fromarray(picture(i)).save(folder / f"images/{split}/{i:06d}.png")
            lines.append(f"images/{split}/{i:06d}.png {i % 16}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def community(tmp_path, small_tasks):
    return write_folder(tmp_path / "vtab-1k" / "dsprites_loc")


def edit(path, number, line):
    """Replace line `number` of a list file; None takes it out."""
    lines = path.read_text().splitlines()
    lines[number - 1 : number] = [] if line is None else [line]
    path.write_text("\n".join(lines) + "\n")


def load_folder(tmp_path, split="train800", task="dsprites_loc"):
    return vtab_tasks.load(task, split, source="folder", data_dir=tmp_path)


@pytest.mark.parametrize("split", vtab_tasks.SPLITS)
def test_folder(community, tmp_path, split):
    data = load_folder(tmp_path, split)
    assert (data.source, data.location, data.split) == ("folder", str(community), split)
    assert str(community) in data.description
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [i % 16 for i in range({"val200": 5, "train800val200": 25}.get(split, 20))]
    assert np.array_equal(np.stack(data.images([4, 0])), np.stack([picture(4), picture(0)]))
    assert np.array_equal(data[3][0], picture(3)) and data[3][1] == 3
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[2][0], picture(2))


def test_folder_right_below_data_dir(community, tmp_path):
    assert load_folder(tmp_path / "vtab-1k").location == str(community)


def test_every_spelling_of_the_folder(community, tmp_path, monkeypatch):
    task = replace(vtab_tasks.get_task("dsprites_loc"), folders=("dsprites_location", "dsprites_loc"))
    monkeypatch.setitem(vtab_tasks.TASKS, "dsprites_loc", task)
    assert len(load_folder(tmp_path)) == 20
    community.rename(community.with_name("dsprites_location"))
    assert load_folder(tmp_path).location.endswith("dsprites_location")


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK"])
def test_every_kind_of_image_becomes_rgb(community, tmp_path, mode):
    suffix = "jpg" if mode in ("L", "CMYK") else "png"
    path = community / f"images/train800/other.{suffix}"
    Image.new("L", (64, 64), 255).convert(mode).save(path)
    edit(community / "train800.txt", 2, f"images/train800/other.{suffix} 1")
    image = load_folder(tmp_path)[1][0]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8 and (image == 255).all()


def test_missing_layout_shows_the_tree(tmp_path, small_tasks):
    (tmp_path / "dsprites_loc" / "images").mkdir(parents=True)  # no list, so it does not count
    with pytest.raises(FileNotFoundError) as caught:
        load_folder(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    for expected in ("dsprites_loc or vtab-1k/dsprites_loc/", "train800.txt", "images/train800/000000.jpg"):
        assert expected in message


def test_missing_list_of_one_split(community, tmp_path):
    (community / "test.txt").unlink()
    assert len(load_folder(tmp_path, "val200")) == 5
    with pytest.raises(FileNotFoundError, match="does not hold dsprites_loc/test in the community layout"):
        load_folder(tmp_path, "test")


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        ("images/train800/000002.png", ValueError, "is not of the form"),
        ("images/train800/000002.png 2 2", ValueError, "has 3 words.*a path has no blanks"),
        ("images/train 800/000002.png 2", ValueError, "has 3 words.*a path has no blanks"),
        ("", ValueError, "is empty.*blank lines only at its end"),
        (" \t", ValueError, "is empty.*blank lines only at its end"),
        ("images/train800/000001.png 1", ValueError, r"000001\.png is in line 2 too: leave one"),
        ("images/train800/000001.png 9", ValueError, r"000001\.png is in line 2 too, with label 1: leave one"),
        ("./images//train800/000001.png 1", ValueError, r"000001\.png is in line 2 too"),
        ("images/../images/train800/000002.png 2", ValueError, "leaves the folder.*relative to the list"),
        ("../dsprites_loc/images/train800/000002.png 2", ValueError, "leaves the folder.*relative to the list"),
        ("/etc/hostname 2", ValueError, "leaves the folder.*relative to the list"),
        ("C:\\images\\000002.png 2", ValueError, "leaves the folder.*relative to the list"),
        ("images\\train800\\000002.png 2", ValueError, "is written with backslashes.*with / between"),
        ("images/train800/0000\0002.png 2", FileNotFoundError, "there is no"),
        ("images/train800/000002.png two", ValueError, "the label 'two' is not an integer"),
        ("images/train800/000002.png 2.0", ValueError, "the label '2.0' is not an integer"),
        ("images/train800/000002.png 1_0", ValueError, "the label '1_0' is not an integer"),
        ("images/train800/000002.png " + 5000 * "1", ValueError, "is not an integer"),
        ("images/train800/000002.png 16", ValueError, "the label 16 is out of range.*classes 0 to 15"),
        ("images/train800/000002.png -1", ValueError, "the label -1 is out of range"),
        ("images/train800/missing.png 2", FileNotFoundError, "there is no .*missing.png"),
        ("images/train800 2", FileNotFoundError, "there is no"),
    ],
)
def test_bad_line_is_named(community, tmp_path, line, error, message):
    edit(community / "train800.txt", 3, line)
    with pytest.raises(error, match=message) as caught:
        load_folder(tmp_path)
    assert f"{community / 'train800.txt'}:3: " in str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda lines: lines[:-1], "has 19 lines, but dsprites_loc/train800 has 20 images"),
        (
            lambda lines: [*lines, b"images/test/000019.png 3\n"],
            "has 21 lines, but dsprites_loc/train800 has 20 images",
        ),
        (lambda lines: [], "has 0 lines"),
        (lambda lines: [b"\xff\xfe\x00images"], "train800.txt is not a text file"),
    ],
)
def test_bad_list(community, tmp_path, change, word):
    path = community / "train800.txt"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(ValueError, match=word):
        load_folder(tmp_path)


@pytest.mark.parametrize(
    "written",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n \n\r\n",
        lambda text: text.rstrip("\n"),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace(" ", "  ").replace("\n", " \t\n"),
    ],
    ids=["CRLF", "BOM", "blank last lines", "no last line end", "tabs", "blanks around"],
)
def test_lists_as_editors_write_them(community, tmp_path, written):
    path = community / "train800.txt"
    path.write_bytes(written(path.read_text()).encode())
    data = load_folder(tmp_path)
    assert data.labels.tolist() == [i % 16 for i in range(20)] and np.array_equal(data[19][0], picture(19))


# ---- folder: images that are there twice ---------------------------------------------------------


@pytest.fixture
def distinct(community):
    """The community layout; images to be tested on are others than training images."""
    for split, count, first in (("val200", 5, 60), ("test", 20, 100)):
        for i in range(count):
            Image.fromarray(picture(first + i)).save(community / f"images/{split}/{i:06d}.png")
    return community


def counted(recwarn):
    return [str(w.message) for w in recwarn if "same content" in str(w.message)]


def test_other_images_are_not_counted(distinct, tmp_path, recwarn):
    for split in vtab_tasks.SPLITS:  # train800val200 holds the images of train800 and val200, as it should
        data = load_folder(tmp_path, split)
        assert data.description == f"folder: images and lists in {distinct}"
    assert not counted(recwarn)


@pytest.mark.parametrize(("split", "trained"), [("test", "train800val200"), ("test", "val200"), ("val200", "train800")])
def test_a_path_in_training_and_in_test(distinct, tmp_path, split, trained):
    edit(distinct / f"{split}.txt", 4, f"./images/{trained}/000002.png 2")
    message = rf"{split}\.txt:4: .*images/{trained}/000002\.png is in {trained}\.txt:3 too.*fetch both lists again"
    with pytest.raises(ValueError, match=message):
        load_folder(tmp_path, split)


@pytest.mark.parametrize("how", ["copy", "link", "symlink"])
@pytest.mark.parametrize("large", [False, True])
def test_the_same_content_in_training_and_in_test_is_counted(distinct, tmp_path, how, large):
    """Official data hold such images, so it is no error."""
    if large:  # beyond the bytes that are always read; the other training images have its size, and its ends
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        for i in range(25):
            noise[32, 32] = i
            Image.fromarray(noise).save(distinct / f"images/train800val200/{i:06d}.png", compress_level=0)
        noise[32, 32] = 99
        Image.fromarray(noise).save(distinct / "images/test/000000.png", compress_level=0)
    path = distinct / "images/test/000007.png"
    path.unlink()
    put = {"copy": shutil.copy, "link": os.link, "symlink": os.symlink}[how]
    put(distinct / "images/train800val200/000003.png", path)
    words = "1 of its 20 images has the same content as a training image"
    with pytest.warns(UserWarning, match=rf"test\.txt: {words}"):
        data = load_folder(tmp_path, "test")
    assert data.description == f"folder: images and lists in {distinct}; {words}"


def test_the_same_content_twice_in_a_list_is_counted(distinct, tmp_path):
    for source, target in ((0, 5), (0, 6), (1, 17)):  # 1 and 17 have the label 1, 0 and 5 and 6 have not
        shutil.copy(distinct / f"images/train800/{source:06d}.png", distinct / f"images/train800/{target:06d}.png")
    words = "5 of its 20 images have the same content as another, 3 of them with another label"
    with pytest.warns(UserWarning, match=rf"train800\.txt: {words}"):
        assert load_folder(tmp_path).description.endswith(f"; {words}")


def test_training_images_that_are_elsewhere_are_not_needed_for_testing(distinct, tmp_path):
    shutil.rmtree(distinct / "images/train800val200")
    assert len(load_folder(tmp_path, "test")) == 20


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_image_is_named(community, tmp_path, kind):
    """Cut short at many places: an error that names list, line and file, whatever Pillow raises."""
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    path = community / "images/train800/000004.png"
    data = load_folder(tmp_path)
    for length in (*range(0, 200, 7), *range(200, len(stream.getvalue()) - 200, 997)):
        path.write_bytes(stream.getvalue()[:length])
        with pytest.raises(ValueError) as caught:
            data[4]
        assert f"{community / 'train800.txt'}:5: {path} cannot be read as an image" in str(caught.value)
    assert np.array_equal(data[5][0], picture(5))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_an_image_that_is_cut_short_is_told_before_anything_is_trained(community, tmp_path, kind):
    stream = io.BytesIO()
    Image.fromarray(picture(4)).save(stream, kind)
    path = community / "images/train800/000004.png"
    path.write_bytes(stream.getvalue() + b"\0" * 100)  # what some writers leave behind the end
    assert len(load_folder(tmp_path)) == 20
    for content in (stream.getvalue()[:-20], b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"train800\.txt:5: .*000004\.png is truncated, or no JPEG or PNG"):
            load_folder(tmp_path)


def test_an_image_of_more_than_8_bits_is_told(community, tmp_path):
    """Pillow would make all of it white."""
    Image.fromarray(np.full((64, 64), 40_000, np.uint16)).save(community / "images/train800/000004.png")
    with pytest.raises(ValueError, match=r"000004\.png cannot be read as an image \(.*mode I;16: write it with 8 bits"):
        load_folder(tmp_path)[4]


def test_an_absurdly_large_image_is_refused(community, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="train800.txt:1: .*cannot be read"):
        load_folder(tmp_path)[0]


def test_an_image_lost_after_loading(community, tmp_path):
    data = load_folder(tmp_path)
    (community / "images/train800/000000.png").unlink()
    with pytest.raises(ValueError, match="train800.txt:1: no image .*000000.png: fetch"):
        data.images([0])


def test_a_flipped_bit_gives_no_other_picture(community, tmp_path):
    """PNG has checksums, which Pillow passes over when it decodes a small one."""
    path, data = community / "images/train800/000004.png", load_folder(tmp_path)
    shades = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)[..., None].repeat(3, -1)
    Image.fromarray(shades).save(path)
    whole, refused = path.read_bytes(), 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert np.array_equal(data[4][0], shades), f"bit {bit}"
        except ValueError as error:
            assert f"train800.txt:5: {path} cannot be read as an image" in str(error)
            refused += 1
    assert refused > len(whole)


def test_images_may_differ_in_size(community, tmp_path):
    Image.new("RGB", (48, 32)).save(community / "images/train800/000001.png")
    data = load_folder(tmp_path)
    assert data[1][0].shape == (32, 48, 3)
    assert [image.shape for image in data.images([0, 1, 2])] == [(64, 64, 3), (32, 48, 3), (64, 64, 3)]


# ---- tfds ----------------------------------------------------------------------------------------


def png(i: int) -> io.BytesIO:
    """Image i of the small dataset, in the official encoding: one channel of 0 and 1. Pixel i is on."""
    image = np.zeros(64 * 64, dtype=np.uint8)
    image[i] = 1
    stream = io.BytesIO()
    Image.fromarray(image.reshape(64, 64)).save(stream, "PNG")
    stream.seek(0)
    return stream


def write_tfds(data_dir, count=60, version=None, encode=png):
    """Write a small dSprites with the official builder; only its download and its HDF5 file are replaced.

    Image files are handed over encoded, because TFDS encodes arrays with TensorFlow.
    """
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")
    official = tfds.builder_cls("dsprites")

    def examples(self):
        for i in range(count):
            labels = {"shape": i % 3, "scale": i % 6, "orientation": i % 40, "x_position": i % 32}
            labels["y_position"] = 0
            example = {f"label_{name}": value for name, value in labels.items()}
            example |= {f"value_{name}": float(value) for name, value in labels.items()}
            if version == "2.1.0":
                example["id"] = f"{i:06d}"
            yield i, example | {"image": encode(i)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "_split_generators", lambda self, _: {"train": examples(self)})
        builder = official(data_dir=data_dir, version=version, file_format="array_record")
        builder.download_and_prepare()
    return tfds_source.Path(builder.data_dir)


def stored_order(count=60):
    """Keys in the order of TFDS, by its own hasher."""
    hashing = pytest.importorskip("tensorflow_datasets.core.hashing")
    return sorted(range(count), key=hashing.Hasher("train").hash_key)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("tfds")
    write_tfds(data_dir)
    return data_dir


def load_tfds(data_dir, split="train800", task="dsprites_loc"):
    return vtab_tasks.load(task, split, source="tfds", data_dir=data_dir)


@pytest.mark.parametrize(
    ("split", "members"),
    [
        ("train800", [*range(20)]),
        ("val200", [*range(30, 35)]),
        ("train800val200", [*range(20), *range(30, 35)]),
        ("test", [*range(40, 60)]),
    ],
)
def test_tfds(prepared, small_tasks, split, members):
    keys = [stored_order()[member] for member in members]
    data = load_tfds(prepared, split)
    assert (data.source, data.location) == ("tfds", str(prepared / "dsprites" / "2.0.0"))
    assert "official dsprites 2.0.0" in data.description and len(data) == len(keys)
    assert data.labels.dtype == np.int64
    assert data.labels.tolist() == [key % 32 // 2 for key in keys]
    turned = load_tfds(prepared, split, "dsprites_ori")
    assert turned.labels.tolist() == [ORI_LABELS[key % 40] for key in keys]
    images = np.stack(data.images(range(len(data))))
    assert images.shape == (len(keys), 64, 64, 3) and images.dtype == np.uint8
    flat = images.reshape(len(keys), -1, 3)
    assert flat.argmax(axis=1).tolist() == [[key] * 3 for key in keys]
    assert (images.sum(axis=(1, 2)) == 255).all()  # one pixel of 255 in every channel
    for i in (0, len(keys) - 1):
        assert np.array_equal(data[i][0], images[i]) and data[i][1] == data.labels[i]


def test_tfds_needs_no_tensorflow(prepared, small_tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # importing it now fails
    data = load_tfds(prepared)
    assert data[0][0].shape == (64, 64, 3) and len(data.labels) == 20


def test_tfds_can_be_pickled(prepared, small_tasks):
    data = load_tfds(prepared).subset(7, seed=0)
    image = data[0][0]
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[0][0], image) and np.array_equal(again.labels, data.labels)


def test_tfds_default_folder(prepared, small_tasks, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load_tfds(None).location == str(prepared / "dsprites" / "2.0.0")
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", str(prepared))
    assert tfds_source.default_data_dir() == prepared / "tensorflow_datasets"


def pretend(data_dir, *versions):
    """Folders that look like prepared versions of dSprites."""
    for version in versions:
        (data_dir / "dsprites" / version).mkdir(parents=True)
        (data_dir / "dsprites" / version / "dataset_info.json").write_text("{}")


def test_newest_accepted_version(tmp_path, small_tasks):
    write_tfds(tmp_path)
    newer = write_tfds(tmp_path, version="2.1.0")
    pretend(tmp_path, "1.9.0", "3.0.0", "2.8.0.incomplete")
    (tmp_path / "dsprites" / "2.9.0").mkdir()  # not finished: it has no dataset_info.json
    data = load_tfds(tmp_path)
    assert data.location == str(newer) and data.labels[0] == stored_order()[0] % 32 // 2
    pretend(tmp_path, "2.9.1", "2.10.0")
    assert tfds_source.find(vtab_tasks.get_task("dsprites_loc"), tmp_path).name == "2.10.0"


def test_tfds_not_prepared(tmp_path, small_tasks):
    with pytest.raises(
        FileNotFoundError,
        match="no prepared version of dsprites.*vtab prepare --task dsprites_loc.*download_and_prepare",
    ):
        load_tfds(tmp_path)
    pretend(tmp_path, "1.0.0")
    with pytest.raises(FileNotFoundError, match=r"only version 1\.0\.0 of dsprites, VTAB takes 2\.\*\.\*"):
        load_tfds(tmp_path)


def test_tfds_prepared_as_tfrecord(tmp_path, small_tasks):
    folder = write_tfds(tmp_path)
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    for shard in folder.glob("*array_record*"):
        shard.rename(shard.with_name(shard.name.replace("array_record", "tfrecord")))
    with pytest.raises(ValueError, match='prepared as tfrecord.*only TensorFlow.*file_format="array_record"'):
        load_tfds(tmp_path)


@pytest.mark.parametrize("count", [59, 61])
def test_tfds_with_another_number_of_examples(tmp_path, small_tasks, count):
    write_tfds(tmp_path, count=count)
    message = (
        rf"has {count} in 'train'; the official data have 60 in 'train', of which dsprites_loc/val200 takes train\[30"
    )
    with pytest.raises(ValueError, match=message):
        load_tfds(tmp_path, "val200")


def test_tfds_with_the_official_sizes_asked_of_small_data(prepared):
    with pytest.raises(ValueError, match=r"has 60 in 'train'; the official data have 737280 .*train\[0:800\]"):
        load_tfds(prepared)


def test_tfds_without_the_split(prepared, small_tasks, monkeypatch):
    elsewhere = replace(SMALL, sizes=(("validation", 5),), test=Part("validation", 0, 5))
    task = replace(vtab_tasks.get_task("dsprites_loc"), editions=(elsewhere,))
    monkeypatch.setitem(vtab_tasks.TASKS, "dsprites_loc", task)
    with pytest.raises(ValueError, match="has no 'validation'; the official data have 5 in 'validation'"):
        load_tfds(prepared, "test")


def test_tfds_with_a_lost_file(tmp_path, small_tasks):
    folder = write_tfds(tmp_path)
    (shard,) = folder.glob("*array_record*")
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name} is missing"):
        load_tfds(tmp_path)


def test_tfds_with_pixels_of_another_scale(tmp_path, small_tasks):
    def bright(i):
        stream = io.BytesIO()
        Image.new("L", (64, 64), 255).save(stream, "PNG")
        stream.seek(0)
        return stream

    write_tfds(tmp_path, encode=bright)
    with pytest.raises(ValueError, match="a pixel of dsprites is 255, but the official data go up to 1"):
        load_tfds(tmp_path)[0]


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_tfds_without_the_package(prepared, small_tasks, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf'{package}: pip install -e "\.\[tfds\]"'):
        load_tfds(prepared)


# ---- auto and locate -----------------------------------------------------------------------------


def test_auto_draws_where_nothing_is_found():
    assert vtab_tasks.locate("dsprites_loc") == [("rendered", None)]
    assert vtab_tasks.load("dsprites_loc", "val200").source == "rendered"


def test_auto_takes_real_data(prepared, community, tmp_path, monkeypatch):
    location = str(prepared / "dsprites" / "2.0.0")
    assert vtab_tasks.load("dsprites_ori", "test", data_dir=prepared).source == "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert vtab_tasks.locate("dsprites_loc") == [("tfds", location), ("rendered", None)]
    assert vtab_tasks.load("dsprites_loc", "test").location == location
    os.symlink(prepared / "dsprites", tmp_path / "dsprites")  # both below one data_dir: the folder is first
    found = [source for source, _ in vtab_tasks.locate("dsprites_loc", tmp_path)]
    assert found == ["folder", "tfds", "rendered"]
    assert vtab_tasks.load("dsprites_loc", "test", data_dir=tmp_path).source == "folder"


def test_auto_does_not_draw_for_a_folder_that_was_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        vtab_tasks.load("dsprites_loc", "test", data_dir=tmp_path)
    for expected in (str(tmp_path), "vtab-1k/dsprites_loc", "dsprites 2.*.*", 'source="rendered"'):
        assert expected in str(caught.value)


def test_auto_does_not_pass_over_damaged_data(community, tmp_path):
    edit(community / "test.txt", 1, "images/test/000000.png 99")
    with pytest.raises(ValueError, match="out of range"):
        vtab_tasks.load("dsprites_loc", "test", data_dir=tmp_path)
