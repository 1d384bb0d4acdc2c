"""Roads with vehicles after KITTI (Geiger et al., IJRR 2013). A surrogate, not the data.

A camera 1.65 m above the road looks ahead, with a third of KITTI's resolution and focal length. Cars, vans and trucks,
of boxes and wheels, stand or drive at known depths, among houses, trees and pedestrians. The three distance bins are
about equally frequent, and some pictures have no vehicle. Lengths are metres.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vtab_tasks.render.noise import noise
from vtab_tasks.render.scene import Array, Camera, Light, Scene, Solid, Texture, draw

HEIGHT, WIDTH, FOCAL = 125, 414, 240.0
EYE = 1.65
BINS = ((4.5, 8.0), (8.0, 20.0), (20.0, 55.0))  # depths of the nearest vehicle
NO_VEHICLE = 0.16  # share of pictures
CAR, VAN, TRUCK, PEDESTRIAN = 0, 1, 2, 3  # TFDS's types
# Half length, half width, half height, and the cabin's share of the length.
BODIES = {CAR: (2.1, 0.85, 0.72, 0.55), VAN: (2.4, 0.95, 1.0, 0.85), TRUCK: (4.0, 1.25, 1.6, 1.0)}


class Vehicle(NamedTuple):
    """A vehicle or a pedestrian: type, and where its middle is on the road."""

    kind: int
    x: float
    depth: float
    turn: float
    colour: tuple[float, float, float]


class Road(NamedTuple):
    """One picture."""

    things: list[Vehicle]
    seed: int


def road(random: np.random.Generator) -> Road:
    """Draw who is on the road, the nearest vehicle first."""
    things = []
    if random.random() >= NO_VEHICLE:
        nearest = random.uniform(*BINS[random.integers(3)])
        things.append(_vehicle(random, nearest))
        for _ in range(random.integers(0, 5)):
            depth = nearest + random.exponential(15) + 5
            if all(abs(depth - other.depth) > 6 for other in things):
                things.append(_vehicle(random, depth))
    for _ in range(random.integers(0, 4)):
        side = random.choice([-1, 1]) * random.uniform(4.5, 7)
        grey = tuple(random.uniform(0.1, 0.8, 3))
        things.append(Vehicle(PEDESTRIAN, side, random.uniform(6, 40), 0.0, grey))
    return Road(things, int(random.integers(2**31)))


def _vehicle(random: np.random.Generator, depth: float) -> Vehicle:
    kind = int(random.choice([CAR, VAN, TRUCK], p=[0.75, 0.15, 0.1]))
    lanes = np.array([-5.2, -1.8, 1.8, 5.2])
    seen = lanes[np.abs(lanes) < 0.75 * depth * WIDTH / 2 / FOCAL]
    turn = np.pi / 2 + random.normal(0, 0.08) + np.pi * random.integers(2)
    return Vehicle(kind, random.choice(seen) + random.normal(0, 0.25), depth, turn, tuple(random.uniform(0.05, 0.9, 3)))


def example(road: Road) -> dict[str, Any]:
    """Return the features for the label, as in TFDS: location is x, y (down) and z (ahead) of the base."""
    location = np.array([(t.x, EYE, t.depth) for t in road.things], np.float32).reshape(-1, 3)
    return {"objects": {"type": np.array([t.kind for t in road.things], np.int64), "location": location}}


def picture(road: Road) -> NDArray[np.uint8]:
    """Draw the picture, uint8 (125, 414, 3)."""
    random = np.random.default_rng(road.seed)
    solids = [solid for thing in road.things for solid in _solids(thing)]
    for side in (-1, 1):
        solids += _roadside(random, side)
    bright = random.uniform(0.6, 1.0)
    sun = (random.uniform(-1, 1), random.uniform(-1, 0.6), random.uniform(0.4, 1.2))
    light = Light(sun, sun=0.65 * bright * random.uniform(0.3, 1), sky=0.5 * bright)
    camera = Camera(
        np.array([0, 0, EYE], np.float32),
        np.array([1, 0, 0], np.float32),
        np.array([0, 0, -1], np.float32),
        np.array([0, 1, 0], np.float32),
        FOCAL * random.uniform(0.97, 1.03),
        WIDTH,
        HEIGHT,
        horizon=0.46 + random.normal(0, 0.01),
    )
    image, _ = draw(Scene(solids, _sky(random, bright), _ground(random)), camera, light)
    return image


def _solids(thing: Vehicle) -> list[Solid]:
    if thing.kind == PEDESTRIAN:
        place = (thing.x, thing.depth)
        return [
            Solid("cylinder", (*place, 0.42), (0.16, 0.16, 0.42), (0.15, 0.15, 0.25)),
            Solid("ellipsoid", (*place, 1.15), (0.24, 0.2, 0.4), thing.colour),
            Solid("ellipsoid", (*place, 1.65), (0.12, 0.12, 0.15), (0.8, 0.6, 0.5)),
        ]
    length, width, height, cabin = BODIES[thing.kind]
    c, s = np.cos(thing.turn), np.sin(thing.turn)

    def at(along: float, aside: float, up: float) -> tuple[float, float, float]:
        return (thing.x + along * c - aside * s, thing.depth + along * s + aside * c, up)

    low = 0.35 + 0.5 * height
    glass = (0.12, 0.14, 0.18)
    parts = [
        Solid("box", at(0, 0, low), (length, width, 0.5 * height), thing.colour, thing.turn, gloss=0.4),
        Solid("box", at(-0.1 * length, 0, low + 0.85 * height), (cabin * length, 0.88 * width, 0.4 * height),
              glass if thing.kind == CAR else thing.colour, thing.turn, gloss=0.3),
    ]  # fmt: skip
    if thing.kind == CAR:
        parts.append(Solid("box", at(-0.1 * length, 0, low + 1.22 * height), (0.42 * length, 0.8 * width, 0.05),
                           thing.colour, thing.turn))  # fmt: skip
    for end, lamp in ((1, (0.9, 0.9, 0.8)), (-1, (0.7, 0.05, 0.05))):
        for side in (-0.7, 0.7):
            place = at(end * (length + 0.01), side * width, low + 0.1)
            parts.append(Solid("box", place, (0.03, 0.15, 0.08), lamp, thing.turn))
        window = at(end * (cabin * length - 0.1 * length * end + 0.02), 0, low + 0.85 * height)
        parts.append(Solid("box", window, (0.02, 0.75 * width, 0.28 * height), glass, thing.turn))
    for along in (-0.62, 0.62):
        for side in (-1, 1):
            parts.append(Solid("cylinder", at(along * length, side * width, 0.33), (0.33, 0.33, 0.12),
                               (0.06, 0.06, 0.06), thing.turn, pitch=np.pi / 2))  # fmt: skip
    return parts


def _roadside(random: np.random.Generator, side: int) -> list[Solid]:
    solids, depth = [], random.uniform(2, 10)
    town = random.random() < 0.6
    while depth < 70:
        x = side * random.uniform(9, 14)
        if random.random() < (0.75 if town else 0.15):
            half = (random.uniform(1, 4), random.uniform(2, 6), random.uniform(1.5, 5))
            tone = random.uniform(0.3, 0.85) * np.array([1, random.uniform(0.8, 1), random.uniform(0.6, 1)])
            solids.append(Solid("box", (x + side * half[0], depth + half[1], half[2]), half, _wall(tone, half)))
            depth += 2 * half[1] + random.uniform(0, 5)
        else:
            tall = random.uniform(1.5, 4)
            green = tuple(random.uniform(0.6, 1.2) * np.array([0.2, 0.38, 0.12]))
            solids.append(Solid("cylinder", (x * 0.9, depth, tall / 2), (0.18, 0.18, tall / 2), (0.3, 0.2, 0.12)))
            solids.append(Solid("ellipsoid", (x * 0.9, depth, tall + 1), (1.5, 1.5, random.uniform(1.2, 2.2)), green))
            depth += random.uniform(2, 12)
    return solids


def _wall(tone: Array, half: tuple[float, float, float]) -> Texture:
    """A house wall with rows of windows, about 2.5 m apart."""
    stretch = np.asarray(half, np.float32) / 1.25

    def texture(points: Array) -> Array:
        at = (points * stretch + 100) % 1
        window = (np.minimum(at[:, 1], at[:, 0]) > 0.3) & (at[:, 2] > 0.35) & (at[:, 2] < 0.8)
        return np.where(window[:, None], np.float32([0.2, 0.25, 0.32]), tone.astype(np.float32))

    return texture


def _ground(random: np.random.Generator) -> Texture:
    asphalt, grass = random.uniform(0.3, 0.5), random.uniform(0.6, 1.1) * np.array([0.25, 0.4, 0.15])
    seed, width = int(random.integers(2**20)), random.uniform(6.2, 7.5)
    marked = random.random() < 0.8

    def texture(points: Array) -> Array:
        x, y = points[:, 0], points[:, 1]
        grain = 0.8 + 0.4 * noise(4 * x, 1.5 * y, seed)
        on_road = np.abs(x) < width
        colour = np.where(on_road[:, None], np.float32([asphalt] * 3), grass.astype(np.float32))
        pavement = on_road & (np.abs(x) > width - 1.6)
        colour = np.where(pavement[:, None], np.float32([0.55, 0.53, 0.5]), colour)
        if marked:
            line = (np.abs(x) < 0.09) & (y % 6 < 3) | (np.abs(np.abs(x) - 3.5) < 0.08)
            colour = np.where(line[:, None], np.float32([0.9, 0.9, 0.88]), colour)
        return colour * grain[:, None]

    return texture


def _sky(random: np.random.Generator, bright: float) -> Texture:
    cloudy, seed = random.random(), int(random.integers(2**20))
    blue = bright * np.array([0.45, 0.62, 0.9], np.float32)
    white = bright * np.array([0.9, 0.92, 0.95], np.float32)

    def texture(rays: Array) -> Array:
        height = np.clip(rays[:, 2] / 0.3, 0, 1)
        cloud = np.clip(noise(6 * rays[:, 0], 20 * rays[:, 2], seed) + cloudy - 0.5, 0, 1)
        share = (cloud + (1 - cloud) * (1 - height) * 0.7)[:, None]
        return share * white + (1 - share) * blue

    return texture
