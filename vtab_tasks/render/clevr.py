"""Scenes after CLEVR (Johnson et al., CVPR 2017): 3 to 10 plain solids on a grey floor. A surrogate, not the data.

Sizes, positions, colours, and the camera with its jitter follow the dataset's generator,
github.com/facebookresearch/clevr-dataset-gen; what differs: one sun instead of three lamps, no ray bounces, half the
resolution, and, in place of counting visible pixels, a rule on how far solids stick out from behind others.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.render.scene import Array, Camera, Light, Scene, Solid, draw

HEIGHT, WIDTH = 160, 240
FOCAL = WIDTH * 35 / 32  # a 35 mm lens on a 32 mm sensor
COLOURS = np.array(
    [[87, 87, 87], [173, 35, 35], [42, 75, 215], [29, 105, 20], [129, 74, 25], [129, 38, 192], [41, 208, 208],
     [255, 238, 51]]
) / 255  # fmt: skip
SHAPES = ("box", "ellipsoid", "cylinder")
RADII = (0.7, 0.35)
GAP = 0.25  # between outlines on the floor
MARGIN = 0.4  # between middles, along each of the camera's directions on the floor
TRIES = 50


class Objects(NamedTuple):
    """One picture: its objects and its camera."""

    solids: list[Solid]
    camera: Camera
    light: Light


def objects(random: np.random.Generator) -> Objects:
    """Draw the objects and the camera of one scene."""
    count = int(random.integers(3, 11))
    camera = Camera.looking_at(
        np.array([7.48, -6.51, 5.34]) + random.uniform(-0.5, 0.5, 3), (0, 0, 0), FOCAL, WIDTH, HEIGHT
    )
    light = Light(np.array([6.45, -2.91, 8.0]) + random.uniform(-1, 1, 3))
    while True:
        solids = _place(random, count, camera)
        if solids is not None:
            return Objects(solids, camera, light)


def example(objects: Objects) -> dict[str, Any]:
    """Return the features for the label, as in TFDS."""
    middles = np.array([solid.centre for solid in objects.solids], np.float32)
    return {"objects": {"pixel_coords": objects.camera.project(middles)}}


def picture(objects: Objects) -> NDArray[np.uint8]:
    """Draw the picture, uint8 (160, 240, 3)."""
    image, _ = draw(Scene(objects.solids, _grey, _grey), objects.camera, objects.light)
    return image


def _grey(points: Array) -> Array:
    return np.full_like(points, 0.62)


def _place(random: np.random.Generator, count: int, camera: Camera) -> list[Solid] | None:
    """Place solids one by one; None if one finds no place in `TRIES`."""
    level = camera.ahead * (1, 1, 0) / np.linalg.norm(camera.ahead[:2])
    solids: list[Solid] = []
    outlines = np.empty((0, 4), np.float32)  # column, row, depth, radius, in pixels but for the depth
    for _ in range(count):
        for _ in range(TRIES):
            radius = RADII[random.integers(2)]
            x, y = random.uniform(-3, 3, 2)
            if any(_too_near(x, y, radius, s, level) for s in solids):
                continue
            projected = camera.project(np.array([[x, y, radius]], np.float32))[0]
            outline = np.array([*projected, FOCAL * radius / projected[2]], np.float32)
            if _hides(outlines, outline):
                continue
            solids.append(_solid(random, x, y, radius))
            outlines = np.vstack([outlines, outline])
            break
        else:
            return None
    return solids


def _solid(random: np.random.Generator, x: float, y: float, radius: float) -> Solid:
    shape = SHAPES[random.integers(3)]
    side = radius / np.sqrt(2) if shape == "box" else radius
    colour = tuple(COLOURS[random.integers(8)])
    metal = bool(random.integers(2))
    return Solid(
        shape,
        (x, y, side),
        (side, side, side),
        colour,
        turn=random.uniform(0, 2 * np.pi),
        gloss=0.8 if metal else 0.08,
    )


def _too_near(x: float, y: float, radius: float, other: Solid, level: Array) -> bool:
    dx, dy = x - other.centre[0], y - other.centre[1]
    if np.hypot(dx, dy) - radius - max(other.half) < GAP:
        return True
    ahead, aside = dx * level[0] + dy * level[1], dx * level[1] - dy * level[0]
    return abs(ahead) < MARGIN or abs(aside) < MARGIN


def _hides(outlines: Array, new: Array) -> bool:
    """Whether of two solids, one behind the other, the farther would not stick out by a third of its width."""
    if not len(outlines):
        return False
    apart = np.hypot(*(outlines[:, :2] - new[:2]).T)
    farther = np.where(outlines[:, 2] > new[2], outlines[:, 3], new[3])
    nearer = np.where(outlines[:, 2] > new[2], new[3], outlines[:, 3])
    return bool((apart + farther < nearer + 0.66 * farther).any())
