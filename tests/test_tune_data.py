"""Folders of one's own images: what is found, read, split, and refused."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from abm_vision.images.data import Preprocessing, load_all
from abm_vision.images.hub import _content
from abm_vision.images.photos import Photos, PhotoSplit, read_photo
from abm_vision.tune.augment import Augmented
from abm_vision.tune.data import load


def picture(path, seed, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def classes(root, *names, count=5, seed=0):
    for k, name in enumerate(names):
        for i in range(count):
            picture(root / name / f"{i}.png", seed + 100 * k + i)
    return root


def load_(place, **changes):
    return load(str(place), **{"validation": 0.2, "seed": 0, "skip_broken": False, **changes})


def names_of(split):
    return [path.name for path in split.paths]


# ----------------------------------------------------------------------------------------------------- one picture

RED, HALF = (255, 0, 0), (255, 127, 127)  # half-transparent red over white


def left_red(mode="RGB"):
    """2 x 1 pixels, red and blue."""
    image = Image.new("RGB", (2, 1))
    image.putdata([(255, 0, 0), (0, 0, 255)])
    return image.convert(mode)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    left_red().save(path, exif=exif)


def clear(path):
    Image.new("RGBA", (1, 1), (255, 0, 0, 128)).save(path)


def palette(path):
    image = Image.new("P", (1, 1), 0)
    image.putpalette([255, 0, 0])
    image.save(path, transparency=0)


def deep(path):
    Image.fromarray(np.array([[0x1234, 0xFF00]], dtype=np.uint16)).save(path)


def photograph(path):
    """A camera's file: a picture, and a smaller one behind it."""
    left_red().save(path, format="MPO", save_all=True, append_images=[left_red()])


@pytest.mark.parametrize(
    ("name", "write", "expected"),
    [
        ("turned.png", turned, [[RED], [(0, 0, 255)]]),
        ("clear.png", clear, [[HALF]]),
        ("palette.png", palette, [[(255, 255, 255)]]),
        ("grey.png", lambda path: Image.new("L", (1, 1), 7).save(path), [[(7, 7, 7)]]),
        ("grey and clear.png", lambda path: Image.new("LA", (1, 1), (0, 0)).save(path), [[(255, 255, 255)]]),
        ("deep.png", deep, [[(0x12,) * 3, (0xFF,) * 3]]),
        ("deep.tif", deep, [[(0x12,) * 3, (0xFF,) * 3]]),
        ("bits.png", lambda path: Image.new("1", (1, 1), 1).save(path), [[(255, 255, 255)]]),
        ("print.tif", lambda path: Image.new("CMYK", (1, 1), (0, 255, 255, 0)).save(path), [[RED]]),
        ("still.gif", lambda path: Image.new("RGB", (1, 1), RED).save(path), [[RED]]),
    ],
)
def test_a_picture_is_read_as_a_viewer_shows_it(tmp_path, name, write, expected):
    write(tmp_path / name)
    np.testing.assert_array_equal(read_photo(tmp_path / name), np.array(expected, dtype=np.uint8))


def test_a_cameras_file_with_a_second_picture_is_one(tmp_path):
    photograph(tmp_path / "camera.jpg")
    assert Image.open(tmp_path / "camera.jpg").n_frames == 2 and read_photo(tmp_path / "camera.jpg").shape == (1, 2, 3)


def animated(path):
    left_red().save(path, save_all=True, append_images=[left_red().rotate(180)])


def cut(path):
    picture(path, 0, (80, 80))
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("moving.gif", animated, "it has 2 frames: save one of them"),
        ("pages.tif", animated, "it has 2 frames"),
        ("cut.jpg", cut, "truncated"),
        ("cut.png", cut, ""),
        ("empty.jpg", lambda path: path.touch(), "it is none that Pillow knows"),
        ("text.jpg", lambda path: path.write_text("no picture"), "it is none that Pillow knows"),
        ("float.tif", lambda path: Image.new("F", (1, 1)).save(path), "mode F: write it with 8 or 16 bits"),
    ],
)
def test_what_is_no_single_picture_is_an_error(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} cannot be read as an image \(.*{reason}"):
        read_photo(tmp_path / name)


# ------------------------------------------------------------------------------------------------------- the split


def test_every_class_is_split_by_its_share_and_the_seed(tmp_path):
    classes(tmp_path, "a", "b", count=10)
    data = load_(tmp_path, validation=0.3)
    assert data.classes == ("a", "b") and data.test is None and data.source == "folder" and not data.notes
    assert Counter(data.validation.labels.tolist()) == {0: 3, 1: 3} and len(data.train) == 14
    assert not set(data.train.paths) & set(data.validation.paths)
    assert load_(tmp_path, validation=0.3).origin() == data.origin()
    other = load_(tmp_path, validation=0.3, seed=1)
    assert other.validation.paths != data.validation.paths and Counter(other.validation.labels.tolist()) == {0: 3, 1: 3}


def test_both_sides_have_a_picture_of_every_class(tmp_path):
    classes(tmp_path, "a", "b", count=2)
    for share in (0.01, 0.99):
        data = load_(tmp_path, validation=share)
        assert data.train.labels.tolist() == data.validation.labels.tolist() == [0, 1]


def test_files_of_the_same_content_stay_on_one_side(tmp_path):
    classes(tmp_path, "a", "b", count=6)
    for i in range(6):
        shutil.copy(tmp_path / "a" / f"{i}.png", tmp_path / "a" / f"{i} copy.png")
    for seed in range(4):
        data = load_(tmp_path, seed=seed)
        sides = [
            {path.name.split(".")[0].split()[0] for path in s.paths if path.parent.name == "a"}
            for s in (data.train, data.validation)
        ]
        assert not sides[0] & sides[1] and sides[0] | sides[1] == set("012345")
    assert any("the same content as another" in note for note in data.notes)


def test_given_parts_are_kept(tmp_path):
    for k, part in enumerate(("Train", "val", "test")):
        classes(tmp_path / part, "a", "b", count=3, seed=1000 * k)
    shutil.copy(tmp_path / "Train" / "a" / "0.png", tmp_path / "test" / "a" / "0.png")
    data = load_(tmp_path)
    assert [len(split) for split in data.splits.values()] == [6, 6, 6]
    assert {path.parts[-3] for path in data.train.paths} == {"Train"}
    assert data.notes == ("test: 1 of its 6 images has the same content as a training image",)
    shutil.rmtree(tmp_path / "val")
    data = load_(tmp_path)
    assert [len(split) for split in data.splits.values()] == [4, 2, 6]
    assert set(data.origin()) == {f"{p} {w}" for p in ("training", "validation", "test") for w in ("images", "labels")}


def test_origin_is_that_of_the_content(tmp_path):
    before = load_(classes(tmp_path / "one", "a", "b")).origin()
    assert load_(shutil.copytree(tmp_path / "one", tmp_path / "two")).origin() == before
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    renamed = load_(tmp_path / "two").origin()
    assert [name for name in before if before[name] != renamed[name]] == ["training labels", "validation labels"]
    picture(tmp_path / "one" / "a" / "0.png", 999)
    assert load_(tmp_path / "one").origin() != before


def test_names_with_blanks_of_other_alphabets_and_nested_folders(tmp_path):
    classes(tmp_path, "red cat", "синий", "cafe\u0301", count=3)
    picture(tmp_path / "red cat" / "2019" / "deep er" / "x.JPG", 7)
    data = load_(tmp_path)
    assert data.classes == ("caf\u00e9", "red cat", "синий")
    assert "x.JPG" in names_of(data.train) + names_of(data.validation)


def test_other_files_are_counted_and_hidden_ones_are_not_seen(tmp_path):
    classes(tmp_path, "a", "b")
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "b" / "old.heic").write_text("x")
    (tmp_path / "a" / ".hidden.png").write_text("x")
    (tmp_path / "__MACOSX" / "a").mkdir(parents=True)  # of an archive packed on macOS
    (tmp_path / ".git" / "objects").mkdir(parents=True)
    (tmp_path / "readme.md").write_text("x")
    assert load_(tmp_path).notes == ("2 files left out, no pictures by name: 1 .txt, 1 .heic",)


def test_links_are_followed_once_and_broken_ones_named(tmp_path):
    classes(tmp_path / "photos", "a", "b")
    classes(tmp_path / "elsewhere", "c", seed=50)
    (tmp_path / "photos" / "c").symlink_to(tmp_path / "elsewhere" / "c")
    (tmp_path / "photos" / "a" / "again").symlink_to(tmp_path / "photos" / "a")
    (tmp_path / "photos" / "a" / "above").symlink_to(tmp_path / "photos")  # pictures of other classes
    assert len(load_(tmp_path / "photos").train.items.paths) == 15
    (tmp_path / "photos" / "b" / "gone.png").symlink_to(tmp_path / "absent.png")
    with pytest.raises(ValueError, match=r"1 of 16 files cannot be read.*\n  no image .*gone\.png"):
        load_(tmp_path / "photos")
    assert len(load_(tmp_path / "photos", skip_broken=True).skipped) == 1


def test_few_photographs_are_in_memory_before_they_are_resized(split, monkeypatch):
    sizes = []
    images = Photos.images
    monkeypatch.setattr(
        Photos, "images", lambda self, positions: sizes.append(len(positions)) or images(self, positions)
    )
    pixels, labels = load_all(split, PRE)
    assert sizes == [4, 4] and labels.tolist() == [0] * 4 + [1] * 4
    assert torch.equal(pixels, torch.cat([PRE.resize([read_photo(path)]) for path in split.paths]))


def test_broken_files_are_named_all_at_once_or_left_out(tmp_path):
    classes(tmp_path, "a", "b")
    for name in ("a/x.jpg", "b/y y.png"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(ValueError, match=r"2 of 12 files cannot be read.*--skip-broken") as found:
        load_(tmp_path)
    assert all(str(tmp_path / name) in str(found.value) for name in ("a/x.jpg", "b/y y.png"))
    data = load_(tmp_path, skip_broken=True)
    assert len(data.train) + len(data.validation) == 10
    assert sorted(map(str, data.skipped)) == [str(tmp_path / "a/x.jpg"), str(tmp_path / "b/y y.png")]
    assert data.notes[0].startswith("2 broken files left out: ")


def test_a_broken_file_is_named_as_it_is_given_now(tmp_path, monkeypatch):
    """What is cached of a file holds from any folder."""
    classes(tmp_path / "photos", "a", "b")
    (tmp_path / "photos/a/x.jpg").write_text("no picture")
    monkeypatch.setattr("abm_vision.runs.content.SETTLED", -10)  # files of just now are cached, too
    monkeypatch.chdir(tmp_path)
    for place in (Path("photos"), tmp_path / "photos"):
        with pytest.raises(ValueError, match="cannot be read") as found:
            load_(place)
        assert f"\n  {place / 'a/x.jpg'} cannot be read as an image" in str(found.value)


def test_one_picture_is_no_folder(tmp_path):
    classes(tmp_path, "a", "b")
    with pytest.raises(ValueError, match="is one picture: give FOLDER/CLASS"):
        load_(next(tmp_path.glob("a/*")))


# ------------------------------------------------------------------------------------------------------------ a CSV


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_of_paths_and_labels(tmp_path, separator):
    classes(tmp_path / "img", "x", "y")
    rows = [(f"img/{c}/{i}.png", f"{c} cat", "test" if i == 4 else "train") for c in "xy" for i in range(5)]
    lines = [separator.join(row) for row in [("Path", "label", "split"), *rows]]
    (tmp_path / "t.csv").write_text("\n".join(lines), encoding="utf-8-sig")
    data = load_(tmp_path / "t.csv")
    assert data.classes == ("x cat", "y cat") and data.source == "csv"
    assert [len(split) for split in data.splits.values()] == [6, 2, 2] and names_of(data.test) == ["4.png"] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; it lacks path and label"),
        ("file,label\na,b", "has the columns file, label; it lacks path"),
        ("path,label\nimg/x/0.png,", r"t\.csv:2: the row lacks its label"),
        ("path,label\n,cat", r"t\.csv:2: the row lacks its path"),
        ("path,label\nimg/x/0.png", r"t\.csv:2: the row lacks its label"),
        ("path,label\nabsent.png,cat", r"t\.csv:2: there is no .*absent\.png: paths are relative"),
        ("path,label\nimg/x/0.png,a\nimg/x/0.png,b", r"t\.csv:3: img/x/0\.png is in line 2 too"),
        ("path,label,split\nimg/x/0.png,a,dev", r"t\.csv:2: split is 'dev'; it must be train, val or test"),
        (b"path,label\n\xff\xfe,a", "is neither a folder nor a table in UTF-8 .*unpack an archive"),
        ("path,label\nimg/x/0.png,a", "has 1 class to train on"),
    ],
)
def test_a_csv_that_cannot_be_used(tmp_path, text, message):
    classes(tmp_path / "img", "x", count=1)
    (tmp_path / "t.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_(tmp_path / "t.csv")


# ----------------------------------------------------------------------------------------- Hugging Face's datasets


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("abm_vision.images.hub.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "datasets"


def saved(root, **columns):
    """A data set as `save_to_disk` writes it: five pictures of each of two classes, encoded as they were."""
    datasets = pytest.importorskip("datasets")
    classes(root / "img", "x", "y")
    paths = sorted(map(str, (root / "img").glob("*/*.png")))
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a/b cat", "dog"])}
    values = {"image": paths, "label": [0] * 5 + [1] * 5}
    features |= {name: datasets.ClassLabel(names=["u"]) for name in columns}
    data = datasets.Dataset.from_dict({**values, **columns}, features=datasets.Features(features))
    datasets.DatasetDict({"train": data, "test": data.select([0, 9])}).save_to_disk(root / "saved")
    return root / "saved", paths


def test_a_data_set_of_hugging_face_is_written_once(tmp_path, cache):
    place, paths = saved(tmp_path)
    data = load_(place)
    assert data.classes == ("a/b cat", "dog") and data.source == "datasets"
    assert [len(split) for split in data.splits.values()] == [8, 2, 2]
    assert data.test.paths[0].read_bytes() == open(paths[0], "rb").read()
    (folder,) = cache.iterdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert load_(place).origin() == data.origin()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_a_data_set_with_two_columns_of_classes(tmp_path, cache):
    place, _ = saved(tmp_path, coarse=[0] * 10)
    with pytest.raises(
        ValueError, match=r"columns image, label, coarse; needed are .*one with a class .*label, coarse"
    ):
        load_(place)
    assert not cache.exists()


def dictionary(root, **labels):
    """Splits of ten pictures with these labels, as `save_to_disk` writes them."""
    datasets = pytest.importorskip("datasets")
    classes(root / "img", "x", "y")
    paths = sorted(map(str, (root / "img").glob("*/*.png")))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})

    splits = {
        name: datasets.Dataset.from_dict({"image": paths, "label": found}, features=features)
        for name, found in labels.items()
    }
    datasets.DatasetDict(splits).save_to_disk(root / "saved")
    return root / "saved"


HALF = [0] * 5 + [1] * 5


@pytest.mark.parametrize("absent", [[-1] * 10, [None] * 10])
def test_splits_without_labels_and_of_other_names_are_left_out(absent, tmp_path, cache):
    """-1 would be the last class by Python's rule."""
    place = dictionary(tmp_path, train=HALF, test=absent, extra=HALF)
    with pytest.warns(UserWarning, match=r"left out extra, test \(no labels, or none of train, val.*used: train$"):
        data = load_(place)
    assert data.test is None and len(data.train) == 8


def test_pictures_without_a_label_or_an_image(tmp_path, cache):
    with pytest.raises(ValueError, match=r"1 of 10 pictures of train have no label \(the first: number 3\)"):
        load_(dictionary(tmp_path / "a", train=[0, 0, 0, -1, *HALF[4:]]))
    with pytest.raises(ValueError, match=r"no split named train with labels \(its splits: testA, test\)"):
        load_(dictionary(tmp_path / "b", testA=HALF, test=HALF))
    assert _content(None) == b""  # a broken file, as others are


def test_a_saved_data_set_by_its_name_and_after_a_split_is_renamed(tmp_path, cache):
    datasets = pytest.importorskip("datasets")
    place = dictionary(tmp_path, train=HALF, test=HALF)
    assert load_(f"hf:{place}").test is not None
    found = datasets.load_from_disk(place)
    datasets.DatasetDict({"train": found["train"], "val": found["test"]}).save_to_disk(tmp_path / "renamed")
    assert load_(tmp_path / "renamed").test is None and len(list(cache.iterdir())) == 2


def test_a_configuration_is_handed_on(monkeypatch):
    datasets, asked = pytest.importorskip("datasets"), []

    def load_dataset(*arguments):
        asked.append(arguments)
        raise ValueError("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for place in ("hf:some/set", "hf:some/set:small"):
        with pytest.raises(ValueError, match="give hf:NAME, or hf:NAME:CONFIGURATION"):
            load_(place)
    assert asked == [("some/set", None), ("some/set", "small")]


# ---------------------------------------------------------------------------------------------------------- refused


def with_empty(root):
    classes(root, "a", "b")
    (root / "c").mkdir()


def nested(root):
    classes(root / "photos", "a", "b")


def alone(root):
    classes(root, "a", "b")
    shutil.rmtree(root / "b")
    picture(root / "b" / "0.png", 0)


def twins(root):
    classes(root, "a", "b")
    shutil.rmtree(root / "b")
    shutil.copy(picture(root / "b" / "0.png", 0), root / "b" / "1.png")


def loose(root):
    classes(root, "a", "b")
    picture(root / "0.png", 0)


def beside(root):
    classes(root / "train", "a", "b")
    classes(root / "test", "a", "b")
    (root / "labels").mkdir()


def foreign(root):
    classes(root / "train", "a", "b")
    classes(root / "test", "a", "c")


def flat(root):
    classes(root / "train", "a", "b")
    picture(root / "train" / "0.png", 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "holds no folder of a class: expected is FOLDER/CLASS/"),
        (with_empty, "has no picture of c: fill the folder, or remove it"),
        (lambda root: classes(root, "a"), r"has 1 class to train on \(a\), two or more are needed\. Expected is"),
        (nested, r"has 1 class to train on \(photos\).*below it are a, b: give the folder that holds them"),
        (alone, "of b there are fewer than two different pictures"),
        (twins, "of b there are fewer than two different pictures"),
        (loose, r"has 1 picture outside the classes' folders \(0\.png\)"),
        (beside, r"holds test, train and also labels: expected is"),
        (foreign, "pictures to validate or test on, and none to train on, of c"),
        (flat, r"train has 1 picture outside the classes' folders"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_(tmp_path)


def test_a_place_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no .*absent: give FOLDER/CLASS"):
        load_(tmp_path / "absent")


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.fixture
def split(tmp_path):
    classes(tmp_path, "a", "b", count=4)
    paths = tuple(sorted(tmp_path.glob("*/*.png")))
    return PhotoSplit(Photos(paths, np.repeat([0, 1], 4)), np.arange(8))


PRE = Preprocessing(16, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("recipe", ["light", "timm"])
def test_what_is_drawn_depends_on_seed_epoch_and_image_alone(split, recipe):
    def epoch(number, workers=0, batch_size=3):
        torch.manual_seed(1)
        found = list(Augmented(split, PRE, torch.device("cpu"), recipe, workers).batches(batch_size, 5, number))
        return torch.cat([pixels for pixels, _ in found]), torch.cat([labels for _, labels in found]), torch.rand(1)

    first, again, other = epoch(0), epoch(0, workers=1, batch_size=4), epoch(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first[0].shape == (8, 3, 16, 16) and not torch.equal(first[0], other[0])
    torch.manual_seed(1)
    assert torch.equal(first[2], torch.rand(1))  # dropout draws the same with and without


def test_images_for_the_initialisation_are_not_changed(split):
    pixels, labels = Augmented(split, PRE, torch.device("cpu"), "timm", 0).select(torch.tensor([6, 1]))
    expected = PRE.normalise(PRE.resize([read_photo(split.paths[k]) for k in (6, 1)]))
    assert torch.equal(pixels, expected) and labels.tolist() == [1, 0]
