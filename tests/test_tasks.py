"""The task table, the label bins, and the TFDS order with its cache.

Expected values: the official VTAB code (sizes, bins), TFDS's own hasher and shuffler, and facts published
with the dataset.
"""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

import vtab_tasks
from vtab_tasks import order, tasks


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder; the file in it that keeps the order."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    order.dsprites_order.cache_clear()
    yield tmp_path / "abm_lora" / "dsprites_order_v1.npy"
    order.dsprites_order.cache_clear()


def test_imports_numpy_and_pillow_only():
    code = (
        "import sys, vtab_tasks\n"
        "heavy = {'torch', 'timm', 'peft', 'abm_vision', 'tensorflow', 'tensorflow_datasets', 'matplotlib'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_torch_dataset():
    torch = pytest.importorskip("torch")
    from torchvision.transforms.v2.functional import pil_to_tensor

    data = vtab_tasks.load("dsprites_loc", "val200", source="rendered")
    plain, transformed = data.torch(), data.torch(pil_to_tensor)
    assert isinstance(plain, torch.utils.data.Dataset) and len(plain) == 200
    image, label = plain[7]
    assert image.dtype == torch.uint8 and image.shape == (3, 64, 64) and label == data[7][1]
    assert np.array_equal(image.permute(1, 2, 0).numpy(), data[7][0]) and torch.equal(image, transformed[7][0])
    batches = list(torch.utils.data.DataLoader(plain, batch_size=64, num_workers=2))
    assert torch.cat([labels for _, labels in batches]).tolist() == data.labels.tolist()


@pytest.mark.parametrize("name", ["dsprites_loc", "dsprites_ori"])
def test_dsprites_rows(name):
    task = vtab_tasks.get_task(name)
    assert (task.name, task.group, task.num_classes, task.image_size) == (name, "structured", 16, (64, 64))
    assert (task.tfds_name, task.tfds_versions, task.folders) == ("dsprites", ("2.*.*",), (name,))
    assert [task.size(split) for split in vtab_tasks.SPLITS] == [800, 200, 1000, 73728]
    assert [str(part) for part in task.parts("train800val200")] == ["train[0:800]", "train[589824:590024]"]
    assert [str(part) for part in task.parts("test")] == ["train[663552:737280]"]
    assert (589824, 663552, 737280) == (737280 * 8 // 10, 737280 * 9 // 10, 3 * 6 * 40 * 32 * 32)
    assert pickle.loads(pickle.dumps(task)) == task


def test_table_is_keyed_by_name():
    assert all(name == task.name for name, task in vtab_tasks.TASKS.items())
    assert vtab_tasks.SPLITS == ("train800", "val200", "train800val200", "test")


def test_unknown_task_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"unknown task 'dsprite_loc'; did you mean dsprites_loc") as caught:
        vtab_tasks.get_task("dsprite_loc")
    assert all(name in str(caught.value).partition("The tasks are: ")[2] for name in vtab_tasks.TASKS)
    with pytest.raises(ValueError, match=r"unknown task 'xyzzy'\. The tasks are: caltech101"):
        vtab_tasks.get_task("xyzzy")


def test_unknown_split_names_all():
    with pytest.raises(ValueError, match="unknown split 'train'.*train800, val200, train800val200, test"):
        vtab_tasks.get_task("dsprites_loc").parts("train")


def test_location_bins():
    label = vtab_tasks.get_task("dsprites_loc").label_fn
    assert [label({"label_x_position": x}) for x in range(32)] == [b for b in range(16) for _ in range(2)]


def test_orientation_bins():
    label = vtab_tasks.get_task("dsprites_ori").label_fn
    expected = [b for b in range(16) for _ in range(3 if b % 2 == 0 else 2)]
    assert [label({"label_orientation": o}) for o in range(40)] == expected
    assert expected[:8] == [0, 0, 0, 1, 1, 2, 2, 2] and expected[38:] == [15, 15]


def test_order_equals_the_hasher_of_tfds():
    hashing = pytest.importorskip("tensorflow_datasets.core.hashing")
    keys = [*range(500), "CLEVR_train_000000.png", "a/b.jpg"]
    hasher = hashing.Hasher("validation")
    expected = sorted(range(len(keys)), key=lambda i: hasher.hash_key(keys[i]))
    assert order.tfds_order("validation", keys).tolist() == expected


def test_order_equals_the_shuffler_of_tfds(tmp_path):
    shuffle = pytest.importorskip("tensorflow_datasets.core.shuffle")
    epath = pytest.importorskip("etils.epath")
    shuffler = shuffle.Shuffler(
        dirpath=epath.Path(tmp_path), hash_salt="train", disable_shuffling=False, ignore_duplicates=False
    )
    for key in range(2000):
        shuffler.add(key, str(key).encode())
    expected = [int(data) for _, data in shuffler]
    assert order.tfds_order("train", range(2000)).tolist() == expected


def test_order_of_fifty_thousand_starts_like_published_outputs():
    """cifar10's `train` has integer keys; published TFDS outputs show these ids first."""
    assert order.tfds_order("train", range(50_000))[:5].tolist() == [16399, 1680, 47917, 17307, 27051]


def test_orders_of_other_data_sets():
    """Their keys sorted by TFDS's hash begin so; names of files, and names that are given."""
    clevr = order.tfds_order("train", [f"CLEVR_train_{k:06d}.png" for k in range(70_000)])
    assert clevr[:3].tolist() == [43876, 33421, 62025]
    camelyon = order.tfds_order("train", [f"train_{k}" for k in range(262_144)])
    assert camelyon[:3].tolist() == [251464, 132287, 133786]
    norb = order.tfds_order("train", range(24_300)), order.tfds_order("test", range(24_300))
    assert [found[:3].tolist() for found in norb] == [[16399, 1680, 17307], [23018, 16932, 19084]]


def test_dsprites_membership(cache):
    rows = order.dsprites_order()
    assert rows.dtype == np.int32 and not rows.flags.writeable
    assert np.array_equal(np.sort(rows), np.arange(737_280))
    assert rows[:5].tolist() == [16399, 634903, 206287, 470425, 352707]
    assert rows[589824:589827].tolist() == [220697, 85843, 84902]
    assert rows[663552:663555].tolist() == [493443, 195884, 225768]

    def sha1(part):
        return hashlib.sha1("\n".join(str(row) for row in part.tolist()).encode()).hexdigest()

    assert sha1(rows[:800]) == "f9fb2cf4ead2408fdaa529064df978d10e5c2874"
    assert sha1(rows[589824:590024]) == "1087f79ec60515f8a8a5a7f82e52cf5acb86fc2a"


def test_order_is_kept_and_read_back(cache, monkeypatch):
    first = order.dsprites_order()
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]  # no draft is left behind
    assert np.array_equal(np.load(cache, allow_pickle=False), first)
    order.dsprites_order.cache_clear()
    monkeypatch.setattr(order, "tfds_order", lambda *_: pytest.fail("the kept order was not used"))
    second = order.dsprites_order()
    assert np.array_equal(second, first) and second.dtype == first.dtype and not second.flags.writeable


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-4],
        lambda content: b"",
        lambda content: b"not an array",
        lambda content: content[:-8] + content[-4:] + content[-8:-4],
    ],
    ids=["short", "empty", "text", "swapped"],
)
def test_damaged_cache_is_rebuilt(cache, damage, monkeypatch):
    expected = order.dsprites_order()
    good = cache.read_bytes()
    cache.write_bytes(damage(good))
    order.dsprites_order.cache_clear()
    monkeypatch.setattr(order, "tfds_order", lambda *_: expected)
    assert np.array_equal(order.dsprites_order(), expected)
    assert cache.read_bytes() == good


def test_unwritable_cache_warns_once_and_works(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    monkeypatch.setattr(order, "tfds_order", lambda *_: np.arange(5))
    order.dsprites_order.cache_clear()
    with pytest.warns(UserWarning, match="cannot be cached") as caught:
        order.dsprites_order()
        assert order.dsprites_order().tolist() == [0, 1, 2, 3, 4]
    assert len(caught) == 1
    order.dsprites_order.cache_clear()


def test_failed_write_leaves_nothing_behind(cache, monkeypatch):
    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_space)
    monkeypatch.setattr(order, "tfds_order", lambda *_: np.arange(5))
    with pytest.warns(UserWarning, match="No space left"):
        order.dsprites_order()
    assert list(cache.parent.iterdir()) == []


@pytest.mark.parametrize("value", ["", "relative/path"])
def test_cache_is_below_home_without_an_absolute_xdg_folder(value, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert order._cache_file() == tmp_path / ".cache" / "abm_lora" / "dsprites_order_v1.npy"


def test_user_without_a_home_works_without_cache(monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr(order, "tfds_order", lambda *_: np.arange(5))
    order.dsprites_order.cache_clear()
    with pytest.warns(UserWarning, match="home directory"):
        assert len(order.dsprites_order()) == 5
    order.dsprites_order.cache_clear()


def test_part_is_a_slice():
    part = tasks.Part("test", 5, 12)
    assert len(part) == 7 and str(part) == "test[5:12]"
