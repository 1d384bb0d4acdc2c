"""Toys after small NORB (LeCun, Huang, Bottou, CVPR 2004), seen from all sides. A surrogate, not the data.

As in the dataset: 5 categories of 10 toys, 9 elevations from 30 to 70 degrees, 18 azimuths, 6 lightings, 96x96 grey
pixels, plain background; toys 4, 6, 7, 8, 9 in its training half and the others in its test half. A toy's azimuth zero
is where somebody has put it, so it differs a little from toy to toy. The toys themselves are made of plain solids.
"""

from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.render.scene import Array, Camera, Light, Scene, Solid, draw

SIZE = 96
GRID = (5, 5, 9, 18, 6)  # category, toy of the half, elevation, azimuth, lighting; the last runs fastest
TOYS = {"train": (4, 6, 7, 8, 9), "test": (0, 1, 2, 3, 5)}
DISTANCE, FOCAL = 6.0, 215.0
LIGHTS = ((3, -4, 5), (-4, -3, 5), (0, -6, 2.5), (5, 1, 3), (-5, 2, 4), (0, 0, 6))


class View(NamedTuple):
    """One picture: which toy, and how it is seen."""

    category: int
    toy: int
    elevation: int
    azimuth: int
    lighting: int


def view(split: str, row: int) -> View:
    """Return the view with this row number in its half of the dataset."""
    category, toy, elevation, azimuth, lighting = (int(k) for k in np.unravel_index(row, GRID))
    return View(category, TOYS[split][toy], elevation, azimuth, lighting)


def example(view: View) -> dict[str, Any]:
    """Return the features for the label, as in TFDS."""
    return {"label_azimuth": view.azimuth, "label_elevation": view.elevation}


def picture(view: View) -> NDArray[np.uint8]:
    """Draw the picture, uint8 (96, 96, 3), grey."""
    solids, zero = _toy(view.category, view.toy)
    turn = zero + np.radians(20 * view.azimuth)
    elevation = np.radians(30 + 5 * view.elevation)
    position = DISTANCE * np.array([0, -np.cos(elevation), np.sin(elevation)]) + (0, 0, 0.5)
    camera = Camera.looking_at(position, (0, 0, 0.5), FOCAL, SIZE, SIZE)
    light = Light(LIGHTS[view.lighting], sun=0.8, sky=0.3 + 0.05 * (view.lighting % 3))
    image, _ = draw(Scene([_turned(s, turn) for s in solids], _plain, _plain), camera, light)
    return image


def _plain(points: Array) -> Array:
    return np.full_like(points, 0.75)


def _turned(solid: Solid, turn: float) -> Solid:
    x, y, z = solid.centre
    c, s = np.cos(turn), np.sin(turn)
    return replace(solid, centre=(c * x - s * y, s * x + c * y, z), turn=solid.turn + turn)


@cache
def _toy(category: int, number: int) -> tuple[tuple[Solid, ...], float]:
    """A toy's solids, its front towards x, and its azimuth zero in radians."""
    random = np.random.default_rng([5, category, number])
    shade = random.uniform(0.35, 0.6)
    zero = random.normal(0, np.radians(15))
    build = (_animal, _human, _plane, _truck, _car)[category]
    return tuple(build(random, (shade,) * 3)), zero


Colour = tuple[float, float, float]


def _animal(random: np.random.Generator, colour: Colour) -> list[Solid]:
    length, width, leg = random.uniform(0.5, 0.75), random.uniform(0.18, 0.3), random.uniform(0.3, 0.55)
    thick, neck, head = random.uniform(0.06, 0.1), random.uniform(0.1, 0.45), random.uniform(0.13, 0.2)
    back = leg + width
    solids = [Solid("ellipsoid", (0, 0, back), (length, width, width * 1.1), colour)]
    for x in (-0.6 * length, 0.6 * length):
        for y in (-0.6 * width, 0.6 * width):
            solids.append(Solid("cylinder", (x, y, leg / 2), (thick, thick, leg / 2 + 0.08), colour))
    front = 0.85 * length
    solids.append(Solid("ellipsoid", (front, 0, back + neck / 2), (0.12, 0.1, 0.15 + neck / 2), colour))
    solids.append(
        Solid("ellipsoid", (front + head, 0, back + neck + 0.1), (head * 1.5, head * 0.8, head * 0.9), colour)
    )
    for y in (-0.1, 0.1):
        solids.append(
            Solid("ellipsoid", (front, y, back + neck + 0.28), (0.04, 0.03, random.uniform(0.08, 0.2)), colour)
        )
    tail = random.uniform(0.1, 0.35)
    solids.append(Solid("ellipsoid", (-length - tail * 0.6, 0, back + 0.05), (tail, 0.04, 0.04), colour))
    return solids


def _human(random: np.random.Generator, colour: Colour) -> list[Solid]:
    leg, torso, width = random.uniform(0.45, 0.6), random.uniform(0.25, 0.35), random.uniform(0.2, 0.32)
    head = random.uniform(0.13, 0.18)
    shoulder = leg + 2 * torso
    stride, swing = random.uniform(0, 0.2), random.uniform(0, 0.3)
    solids = [Solid("ellipsoid", (0, 0, leg + torso), (0.15, width, torso * 1.1), colour)]
    for side in (-1, 1):
        foot = side * stride
        solids.append(Solid("cylinder", (foot / 2, side * 0.12, leg / 2), (0.085, 0.085, leg / 2 + 0.03), colour))
        solids.append(Solid("box", (foot / 2 + 0.07, side * 0.12, 0.04), (0.14, 0.07, 0.04), colour))
        arm = (-side * swing / 2 + 0.1, side * (width + 0.05), shoulder - 0.28)
        solids.append(Solid("ellipsoid", arm, (0.09 + swing / 2, 0.07, 0.28), colour))
    solids.append(Solid("ellipsoid", (0.02, 0, shoulder + head), (head, head * 0.9, head * 1.15), colour))
    solids.append(Solid("ellipsoid", (head, 0, shoulder + head), (0.06, 0.03, 0.03), colour))
    if random.random() < 0.5:
        solids.append(Solid("cylinder", (0, 0, shoulder + 2 * head), (head * 1.3, head * 1.3, 0.04), colour))
    if random.random() < 0.5:
        solids.append(Solid("box", (-0.2, 0, shoulder - 0.25), (0.1, 0.15, 0.2), colour))
    return solids


def _plane(random: np.random.Generator, colour: Colour) -> list[Solid]:
    length, body, span = random.uniform(0.75, 0.95), random.uniform(0.1, 0.16), random.uniform(0.7, 0.95)
    chord, along, height = random.uniform(0.14, 0.25), random.uniform(-0.1, 0.2), random.uniform(0.35, 0.6)
    fin = random.uniform(0.15, 0.28)
    solids = [
        Solid("ellipsoid", (0, 0, height), (length, body, body), colour),
        Solid("box", (along, 0, height + random.uniform(-0.08, 0.1)), (chord, span, 0.025), colour),
        Solid("box", (-0.85 * length, 0, height + 0.06), (0.5 * chord, 0.35 * span, 0.02), colour),
        Solid("box", (-0.85 * length, 0, height + fin), (0.5 * chord, 0.02, fin), colour),
        Solid("ellipsoid", (0.45 * length, 0, height + 0.8 * body), (0.18, 0.6 * body, 0.07), colour),
    ]
    for place in (0.35, 0.65)[: random.integers(0, 3)]:
        for side in (-1, 1):
            engine = (along + 0.1, side * place * span, height - 0.08)
            solids.append(Solid("ellipsoid", engine, (0.18, 0.06, 0.06), colour))
    return solids


def _wheels(places: tuple[float, ...], width: float, radius: float, colour: Colour) -> list[Solid]:
    dark = tuple(0.4 * c for c in colour)
    return [
        Solid("cylinder", (x, side * width, radius), (radius, radius, 0.06), dark, pitch=np.pi / 2)
        for x in places
        for side in (-1, 1)
    ]


def _truck(random: np.random.Generator, colour: Colour) -> list[Solid]:
    length, width, radius = random.uniform(0.7, 0.9), random.uniform(0.24, 0.34), random.uniform(0.12, 0.17)
    cab, load = random.uniform(0.18, 0.26), random.uniform(0.22, 0.4)
    floor = radius + 0.08
    wheels = (0.7 * length, -0.65 * length, -0.3 * length)[: random.integers(2, 4)]
    solids = [
        Solid("box", (0, 0, floor), (length, width, 0.05), colour),
        Solid("box", (length - cab, 0, floor + 0.27), (cab, width, 0.27), colour),
        *_wheels(wheels, width, radius, colour),
    ]
    kind = random.integers(3)
    middle, half = -cab, length - cab - 0.06
    if kind == 0:
        solids.append(Solid("box", (middle, 0, floor + load), (half, width, load), colour))
    elif kind == 1:
        tank = Solid("ellipsoid", (middle, 0, floor + 0.3), (half, width, 0.28), colour)
        solids.append(tank)
    else:
        for side in (-1, 1):
            solids.append(Solid("box", (middle, side * width, floor + 0.15), (half, 0.03, 0.12), colour))
        solids.append(Solid("ellipsoid", (middle, 0, floor + 0.1), (0.8 * half, 0.8 * width, 0.2), colour))
    return solids


def _car(random: np.random.Generator, colour: Colour) -> list[Solid]:
    length, width, radius = random.uniform(0.7, 0.9), random.uniform(0.28, 0.38), random.uniform(0.12, 0.17)
    low, cabin = random.uniform(0.12, 0.18), random.uniform(0.12, 0.2)
    floor, back = radius + 0.02, random.uniform(0.05, 0.35)
    solids = [
        Solid("box", (0, 0, floor + low), (length, width, low), colour),
        Solid("ellipsoid", (length, 0, floor + low), (0.15, width * 0.95, low * 0.9), colour),
        Solid("box", (-back, 0, floor + 2 * low + cabin), (0.4 * length, 0.85 * width, cabin), colour),
        *_wheels((0.62 * length, -0.62 * length), width, radius, colour),
    ]
    if random.random() < 0.5:
        solids.append(
            Solid("ellipsoid", (-back, 0, floor + 2 * low + cabin), (0.65 * length, 0.8 * width, cabin), colour)
        )
    if random.random() < 0.3:
        solids.append(Solid("box", (-0.95 * length, 0, floor + 2 * low + 0.15), (0.05, width, 0.02), colour))
    return solids
