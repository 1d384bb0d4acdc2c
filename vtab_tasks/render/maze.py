"""Maze corridors with one object after DeepMind Lab (Beattie et al., 2016). A surrogate, not the data.

A first-person view down a corridor with openings, textured walls, floor and ceiling. An apple or a melon gives a
positive reward, a lemon a negative one; it stands close, far or very far. The dataset's own thresholds of distance are
not published; here they are 3 and 6 of the corridor's half widths. Lengths are half widths.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.render.noise import noise
from vtab_tasks.render.scene import Array, Camera, Light, Scene, Solid, Texture, draw

HEIGHT, WIDTH, FOCAL = 120, 160, 90.0
DISTANCES = ((1.6, 3.0), (3.0, 6.0), (6.0, 11.0))  # close, far, very far
CEILING = 2.0


class View(NamedTuple):
    """One picture: 0 apple, 1 melon, 2 lemon; the object's distance and bin; the rest from the seed."""

    kind: int
    bin: int
    distance: float
    seed: int


def view(random: np.random.Generator) -> View:
    """Draw a view at random. Both rewards, and the three distances, are equally frequent."""
    negative, far = int(random.integers(2)), int(random.integers(3))
    kind = 2 if negative else int(random.integers(2))
    return View(kind, far, random.uniform(*DISTANCES[far]), int(random.integers(2**31)))


def example(view: View) -> dict[str, Any]:
    """Return the features for the label, as in TFDS: {close, far, very far} x {positive, negative}."""
    return {"label": view.bin + (3 if view.kind == 2 else 0)}


def picture(view: View) -> NDArray[np.uint8]:
    """Draw the picture, uint8 (120, 160, 3)."""
    random = np.random.default_rng(view.seed)
    yaw = random.normal(0, 0.08)
    position = np.array([random.uniform(-0.45, 0.45), 0, random.uniform(0.8, 1.0)], np.float32)
    ahead = np.array([np.sin(yaw), np.cos(yaw), random.normal(-0.06, 0.03)], np.float32)
    camera = Camera.looking_at(position, position + ahead, FOCAL, WIDTH, HEIGHT)
    aside = np.clip(random.normal(0, 0.35), -0.6, 0.6)
    solids = [*_corridor(random, aside), *_object(random, view.kind, aside, view.distance)]
    light = Light((random.normal(0, 0.5), random.normal(-0.8, 0.4), 1), sun=0.45, sky=random.uniform(0.5, 0.75))
    floor = _tiles(random, random.uniform(0.5, 1.5), 1.0)
    image, _ = draw(Scene(solids, lambda rays: np.zeros_like(rays), floor, shadows=False), camera, light)
    return image


def _corridor(random: np.random.Generator, aside: float) -> list[Solid]:
    """The corridor, which does not depend on the object's distance: the object is `aside`, a pillar opposite."""
    end = random.uniform(12.5, 19)
    walls, ceiling = _tiles(random, 1.5, 1.0), _tiles(random, 1.0, 1.0)
    top = (0, end / 2, CEILING + 0.05)
    solids = [
        Solid("box", top, (6, end, 0.05), _from(ceiling, top, (6, end, 0.05), (0, 1))),
        _block(walls, 0, end + 1, 6, 1),
    ]
    for side in (-1, 1):
        opened = random.random(int(end // 2) + 2) < 0.25
        for cell, is_open in enumerate(opened):
            x = side * (4.0 if is_open else 2.0)  # an opening shows the wall behind it
            solids.append(_block(walls, x, 2 * cell - 1, 1, 1))
    if random.random() < 0.3:
        solids.append(_block(walls, -0.8 if aside > 0 else 0.8, random.uniform(1.8, 9), 0.15, 0.15))
    return solids


def _block(texture: Texture, x: float, y: float, half_x: float, half_y: float) -> Solid:
    centre, half = (x, y, CEILING / 2), (half_x, half_y, CEILING / 2)
    return Solid("box", centre, half, _from(texture, centre, half, (0, 1, 2)))


def _from(texture: Texture, centre: tuple[float, ...], half: tuple[float, ...], axes: tuple[int, ...]) -> Texture:
    """A texture of the world, on a solid: the pattern continues from block to block."""

    def on_solid(points: Array) -> Array:
        world = points * np.asarray(half, np.float32) + np.asarray(centre, np.float32)
        if len(axes) == 3:  # upright: along the wall, and up
            world = np.stack([world[:, 0] + world[:, 1], world[:, 2], world[:, 2]], axis=-1)
        return texture(world)

    return on_solid


def _tiles(random: np.random.Generator, size: float, contrast: float) -> Texture:
    """Tiles or stones of two colours with joints and grain."""
    first, second = random.uniform(0.15, 0.9, (2, 3)).astype(np.float32)
    second = first + contrast * 0.5 * (second - first)
    seed, offset = int(random.integers(2**20)), random.choice([0.0, 0.5])

    def texture(points: Array) -> Array:
        v = points[:, 1] * 2 / size
        u = points[:, 0] / size + offset * (np.floor(v) % 2)
        share = np.clip(1.6 * noise(u * 0.9, v * 0.9, seed) - 0.3 + 0.4 * (noise(8 * u, 8 * v, seed + 1) - 0.5), 0, 1)
        joint = (u % 1 < 0.05) | (v % 1 < 0.07)
        colour = first + share[:, None] * (second - first)
        return np.where(joint[:, None], 0.45 * colour, colour).astype(np.float32)

    return texture


def _object(random: np.random.Generator, kind: int, x: float, y: float) -> list[Solid]:
    size, turn = random.uniform(0.2, 0.27), random.uniform(0, 2 * np.pi)
    up = size + random.uniform(0.0, 0.25)  # they hover
    tint = random.uniform(0.8, 1.1)
    if kind == 0:
        red = (0.8 * tint, 0.1, 0.08) if random.random() < 0.6 else (0.45 * tint, 0.7 * tint, 0.12)
        return [
            Solid("ellipsoid", (x, y, up), (size, size, 0.9 * size), red, gloss=0.4),
            Solid("cylinder", (x, y, up + size), (0.03, 0.03, 0.4 * size), (0.3, 0.2, 0.1)),
            Solid("ellipsoid", (x + 0.08, y, up + 1.2 * size), (0.1, 0.04, 0.03), (0.2, 0.6, 0.15)),
        ]
    if kind == 1:
        return [Solid("ellipsoid", (x, y, up), (1.15 * size, size, size), _stripes(tint), turn, gloss=0.3)]
    yellow = (0.95 * tint, 0.85 * tint, 0.15) if random.random() < 0.6 else (0.6 * tint, 0.8 * tint, 0.15)
    body = Solid("ellipsoid", (x, y, up), (1.1 * size, 0.75 * size, 0.75 * size), yellow, turn, gloss=0.4)
    c, s = np.cos(turn), np.sin(turn)
    tips = [
        Solid(
            "ellipsoid", (x + e * size * c, y + e * size * s, up), (0.3 * size, 0.22 * size, 0.22 * size), yellow, turn
        )
        for e in (-1.05, 1.05)
    ]
    return [body, *tips]


def _stripes(tint: float) -> Texture:
    def texture(points: Array) -> Array:
        dark = np.sin(5 * np.arctan2(points[:, 2], points[:, 1])) > 0.1
        return np.where(dark[:, None], np.float32([0.1, 0.35, 0.1]), np.float32([0.45, 0.7, 0.3])) * np.float32(tint)

    return texture
