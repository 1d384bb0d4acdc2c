"""The scenes that are drawn offline: geometry against brute force, labels against pictures, and the cache.

Brute force: points are taken along a ray in small steps, in double precision, and asked whether they are inside.
"""

import contextlib
import sqlite3
import subprocess
import sys
import warnings

import numpy as np
import pytest

import vtab_tasks
from vtab_tasks.order import tfds_order
from vtab_tasks.render import cache, clevr, maze, norb, road
from vtab_tasks.render.scene import Camera, Light, Scene, Solid, draw
from vtab_tasks.sources import rendered

SURROGATES = ["clevr_count", "clevr_dist", "dmlab", "kitti_dist", "snorb_azim", "snorb_elev"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def inside(solid: Solid, points: np.ndarray) -> np.ndarray:
    """Whether points (n, 3) are in a solid, in double precision."""
    c, s, cp, sp = np.cos(solid.turn), np.sin(solid.turn), np.cos(solid.pitch), np.sin(solid.pitch)
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    own = (points - np.array(solid.centre)) @ (about_z @ about_x) / np.array(solid.half)
    if solid.shape == "box":
        return (np.abs(own) < 1).all(-1)
    if solid.shape == "cylinder":
        return (np.hypot(own[:, 0], own[:, 1]) < 1) & (np.abs(own[:, 2]) < 1)
    return (own**2).sum(-1) < 1


def black(rays):
    return np.zeros_like(rays)


@pytest.mark.parametrize("shape", ["box", "cylinder", "ellipsoid"])
@pytest.mark.parametrize("seed", range(3))
def test_a_solid_is_seen_where_it_is(shape, seed):
    random = np.random.default_rng(seed)
    solid = Solid(shape, (0.2, 0.1, 0.4), tuple(random.uniform(0.3, 1.1, 3)), (1, 1, 1), *random.uniform(0, 3, 2))
    camera = Camera.looking_at((3.0, -4.0, 2.5), (0, 0, 0.3), 40, 48, 40)
    _, seen = draw(Scene([solid], black), camera, Light((0, 0, 1)))
    rays, steps = camera.rays().astype(float), np.linspace(0.5, 9, 1500)
    wrong = 0
    for row in range(0, 40, 3):
        for column in range(48):
            points = camera.position + steps[:, None] * rays[row, column]
            wrong += inside(solid, points).any() != (seen[row, column] == 0)
    assert wrong <= 3  # rays that graze it within a step's length


def test_the_nearest_solid_is_seen_and_lights_fall_on_it():
    near = Solid("box", (0, 3, 0), (1, 0.5, 1), (1, 0, 0))
    far = Solid("ellipsoid", (0, 6, 0), (3, 1, 3), (0, 1, 0))
    camera = Camera.looking_at((0, 0, 0), (0, 1, 0), 20, 40, 40)
    for solids, front in (([near, far], 0), ([far, near], 1)):
        image, seen = draw(Scene(solids, black, shadows=False), camera, Light((0, -1, 0), sun=0.5, sky=0.4))
        assert seen[20, 20] == front and (seen == -2).any() and (seen == 1 - front).any()
        # Facing the sun: sun + sky x 0.75 of the colour.
        assert image[20, 20].tolist() == [round(255 * (0.5 + 0.3)), 0, 0]


def test_shadow_on_the_floor():
    """A ball of radius 1 at height 2 under a sun straight above: a disc of radius 1."""
    camera = Camera.looking_at((0, -0.001, 30), (0, 0, 0), 300, 80, 80)
    ball = Solid("ellipsoid", (0, 0, 2), (1, 1, 1), (0, 0, 0))
    scene = Scene([ball, Solid("box", (3, 0, 0.5), (0.5, 0.5, 0.5), (0, 0, 0))], black, np.ones_like)
    image, seen = draw(scene, camera, Light((0.5, 0, 1), sun=0.5, sky=0.4))
    points = camera.position + (-camera.position[2] / camera.rays()[..., 2])[..., None] * camera.rays()
    floor = seen == -1
    dark = floor & (image[..., 0] == round(255 * 0.4))
    assert (image[floor & ~dark, 0] == round(255 * (0.4 + 0.5 * 1 / np.hypot(0.5, 1)))).all()
    sun = np.array([0.5, 0, 1]) / np.hypot(0.5, 1)
    steps = np.linspace(0, 6, 700)
    for row in range(0, 80, 4):
        for column in range(0, 80, 2):
            if not floor[row, column]:
                continue
            ray = points[row, column] + steps[:, None] * sun
            blocked = any(inside(solid, ray).sum() > 3 for solid in scene.solids)
            grazed = any(0 < inside(solid, ray).sum() <= 8 for solid in scene.solids)
            assert blocked == dark[row, column] or grazed


def test_projection_by_hand():
    camera = Camera.looking_at((0, 0, 1), (0, 5, 1), 100, 64, 48)
    column, row, depth = camera.project(np.array([[1.0, 4.0, 2.0]]))[0]
    assert (column, row, depth) == (32 + 100 * 1 / 4, 24 - 100 * 1 / 4, 4)
    assert np.allclose(camera.rays()[24, 32], [0.005, 1, -0.005])


# ---- scenes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_clevr_has_the_shares_of_the_original_geometry():
    data = vtab_tasks.load("clevr_dist", "test", source="rendered").subset(800, 0)
    shares = np.bincount(data.labels, minlength=6) / 800
    assert np.abs(shares - [0.19, 0.24, 0.23, 0.16, 0.09, 0.08]).max() < 0.05  # simulated for the fact sheet
    counts = vtab_tasks.load("clevr_count", "test", source="rendered").subset(800, 0).labels
    assert np.bincount(counts, minlength=8).min() > 60


def test_clevr_objects_keep_apart_and_are_seen():
    hidden = total = 0
    for seed in range(40):
        scene = clevr.objects(np.random.default_rng(seed))
        _, seen = draw(Scene(scene.solids, black, np.ones_like, shadows=False), scene.camera, scene.light)
        pixels = [int((seen == k).sum()) for k in range(len(scene.solids))]
        hidden += sum(p < 15 for p in pixels)
        total += len(pixels)
        for k, a in enumerate(scene.solids):
            assert abs(a.centre[0]) <= 3 and abs(a.centre[1]) <= 3
            for b in scene.solids[:k]:
                gap = np.hypot(a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]) - max(a.half) - max(b.half)
                assert gap > 0.25 - 0.21  # a box's outline is taken at its corners' radius
    assert hidden / total < 0.02


def test_norb_shows_other_toys_in_its_two_halves():
    """And every combination once, under the official order."""
    for split, toys, first in (
        ("train", {4, 6, 7, 8, 9}, [16399, 1680, 17307]),
        ("test", {0, 1, 2, 3, 5}, [23018, 16932, 19084]),
    ):
        views = {norb.view(split, row) for row in range(24_300)}
        assert len(views) == 24_300 and {view.toy for view in views} == toys
        assert rendered._norb_order(split)[:3].tolist() == first  # of the fact sheet
        assert tfds_order(split, range(24_300))[:3].tolist() == first
    data = vtab_tasks.load("snorb_azim", "train800", source="rendered")
    row = 16399  # the first
    assert data.labels[0] == row // 6 % 18
    assert vtab_tasks.load("snorb_elev", "train800", source="rendered").labels[0] == row // 6 // 18 % 9


def test_norb_toys_turn_and_differ():
    a = norb.picture(norb.View(4, 0, 3, 0, 0)).astype(int)
    assert np.array_equal(a[..., 0], a[..., 1])  # grey
    others = [norb.View(4, 0, 3, 5, 0), norb.View(4, 1, 3, 0, 0), norb.View(4, 0, 8, 0, 0), norb.View(4, 0, 3, 0, 3)]
    assert all(np.abs(a - norb.picture(view)).mean() > 1 for view in others)


@pytest.mark.slow
def test_the_nearest_vehicle_of_a_road_is_seen():
    hidden, labels = 0, []
    for seed in range(80):
        scene = road.road(np.random.default_rng(seed))
        labels.append(vtab_tasks.get_task("kitti_dist").label_fn(road.example(scene)))
        vehicles = [t for t in scene.things if t.kind != road.PEDESTRIAN]
        assert (labels[-1] == 3) == (not vehicles)
        if vehicles:
            nearest = min(vehicles, key=lambda t: t.depth)
            assert labels[-1] == sum(nearest.depth > limit for limit in (8, 20))
            with_it, without = (
                road.picture(scene),
                road.picture(road.Road([t for t in scene.things if t is not nearest], scene.seed)),
            )
            hidden += (with_it != without).any(-1).sum() < 12
    assert hidden <= 2
    assert np.bincount(labels).min() > 5


@pytest.mark.slow
def test_an_object_in_the_maze_is_seen_and_smaller_far_away():
    sizes = {0: [], 1: [], 2: []}
    for seed in range(90):
        view = maze.view(np.random.default_rng(seed))
        picture, other = maze.picture(view), maze.picture(view._replace(kind=2 if view.kind != 2 else 0))
        sizes[view.bin].append(int((picture != other).any(-1).sum()))
        label = maze.example(view)["label"]
        assert label % 3 == sum(view.distance > limit for limit in (3, 6))  # close, far, very far
        assert label // 3 == (view.kind == 2)  # a lemon, which is punished
    assert sum(size < 4 for found in sizes.values() for size in found) <= 4
    assert np.median(sizes[0]) > 1.8 * np.median(sizes[1]) > 1.8 * 1.8 * np.median(sizes[2])


# ---- as data -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROGATES)
def test_surrogates_as_data(name):
    data = vtab_tasks.load(name, "train800val200", source="rendered")
    assert len(data) == 1000 and data.source == "rendered" and data.location is None
    assert "rendered" in data.description and "surrogate, not the official data" in data.description
    assert data.labels.min() >= 0 and data.labels.max() < data.task.num_classes
    assert len(set(data.labels.tolist())) == data.task.num_classes
    images = data.images([3, 800, 0])
    assert all(image.dtype == np.uint8 and image.shape == images[0].shape for image in images)
    assert np.array_equal(images[2], data[0][0]) and not np.array_equal(images[0], images[2])
    test = vtab_tasks.load(name, "test", source="rendered")
    assert len(test) == test.task.size("test")
    assert not set(test.items.places) & set(data.items.places)


@pytest.mark.slow
def test_a_picture_is_a_function_of_its_place(tmp_path):
    code = (
        "import hashlib, vtab_tasks\n"
        f"for name in {SURROGATES!r}:\n"
        "    data = vtab_tasks.load(name, 'val200', source='rendered')\n"
        "    print(hashlib.sha256(data[7][0].tobytes()).hexdigest(), data.labels[7])\n"
    )
    found = []
    for hash_seed in ("1", "2"):
        environment = {"XDG_CACHE_HOME": str(tmp_path / hash_seed), "PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        found.append(done.stdout)
    assert found[0] == found[1] and found[0].count("\n") == len(SURROGATES)


def test_pictures_are_drawn_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def picture(position):
        calls.append(position)
        return np.full((4, 5, 3), position, np.uint8)

    first = cache.drawn("some", "train", [3, 1, 2], picture)
    assert first.shape == (3, 4, 5, 3) and first[:, 0, 0, 0].tolist() == [3, 1, 2] and calls == [3, 1, 2]
    again = cache.drawn("some", "train", [2, 5, 3], picture)
    assert again[:, 0, 0, 0].tolist() == [2, 5, 3] and calls == [3, 1, 2, 5]
    assert cache.drawn("some", "test", [2], picture).shape[0] == 1 and calls[-1] == 2
    assert [p.name for p in (tmp_path / "abm_lora").iterdir()] == ["pictures-some.sqlite"]


def test_without_a_cache_pictures_are_drawn_every_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="pictures cannot be cached"):
        found = cache.drawn("some", "train", [1], lambda position: np.full((2, 2, 3), position, np.uint8))
    assert found.tolist() == np.ones((1, 2, 2, 3)).tolist()


def test_a_killed_process_leaves_whole_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cache, "TOGETHER", 2)

    def killed(position):
        if position == 3:
            raise KeyboardInterrupt
        return np.full((2, 2, 3), position, np.uint8)

    with pytest.raises(KeyboardInterrupt):
        cache.drawn("some", "train", [0, 1, 2, 3], killed)
    drawn = []
    found = cache.drawn("some", "train", range(5), lambda p: drawn.append(p) or np.full((2, 2, 3), p, np.uint8))
    assert drawn == [2, 3, 4] and found[:, 0, 0, 0].tolist() == [*range(5)]


def noise(position):
    return np.random.default_rng(position).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def test_a_flipped_bit_gives_no_other_picture(tmp_path, monkeypatch):
    """Anywhere in the file: pictures, their keys, the index, the pages' heads, the schema."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = cache.drawn("some", "train", range(20), noise)
    (path,) = (tmp_path / "abm_lora").iterdir()
    whole, random, drawn_again = path.read_bytes(), np.random.default_rng(0), 0
    for bit in random.choice(8 * len(whole), 300, replace=False):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        drawn = []
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            found = cache.drawn(
                "some", "train", range(20), lambda position, to=drawn: to.append(position) or noise(position)
            )
        assert np.array_equal(found, expected), f"bit {bit}"
        drawn_again += 0 < len(drawn) < 20
    assert drawn_again > 30  # of that picture alone


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE pictures SET png = x'00' WHERE position = 1",
        "UPDATE pictures SET png = substr(png, 1, 100) WHERE position = 1",
        "UPDATE pictures SET png = 'text' WHERE position = 1",
        "UPDATE pictures SET png = NULL WHERE position = 1",
        "UPDATE pictures SET png = (SELECT png FROM pictures WHERE position = 2) WHERE position = 1",
        "DELETE FROM pictures WHERE position = 2; UPDATE pictures SET position = 2 WHERE position = 1",
    ],
)
def test_a_damaged_picture_is_drawn_and_kept_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected, again = cache.drawn("some", "train", range(3), noise), []
    with contextlib.closing(sqlite3.connect(next((tmp_path / "abm_lora").iterdir()))) as store:
        store.executescript(damage)
        store.commit()
    for _ in range(2):
        found = cache.drawn("some", "train", range(3), lambda position: again.append(position) or noise(position))
        assert np.array_equal(found, expected)
    assert again in ([1], [1, 2])


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected = cache.drawn("some", "train", range(3), noise)
    (path,) = (tmp_path / "abm_lora").iterdir()
    path.write_bytes(b"no database" * 1000)
    with pytest.warns(UserWarning, match="pictures-some.sqlite.*drawn again every time.*not a database.*delete"):
        assert np.array_equal(cache.drawn("some", "train", range(3), noise), expected)
