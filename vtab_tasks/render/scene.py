"""A small ray caster: boxes, cylinders and ellipsoids on a floor, one sun with shadows, in numpy.

World axes: x right, y forward, z up, in whatever unit the scene has. A ray is camera + t d with the viewing axis'
component of d equal to 1, so that t is the depth along that axis, the quantity in the third of CLEVR's pixel
coordinates and in KITTI's z.

Every solid is a unit one (radius or half side 1 around the origin) under a rotation and a stretch. All three are
convex: a ray is inside between two depths, found where the intervals of their slabs and quadrics overlap.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Texture = Callable[[Array], Array]  # points (n, 3) to colours (n, 3) in [0, 1]

_FAR = np.float32(1e6)
_EPSILON = 1e-3  # how far a shadow's ray starts from its surface, as a share of the scene's unit


@dataclass(frozen=True)
class Solid:
    """One solid.

    Attributes:
        shape: `box`, `cylinder` (its axis is the third) or `ellipsoid`.
        centre: (x, y, z).
        half: half sides, or radii, along its own axes.
        colour: (r, g, b) in [0, 1], or a texture of points in its own frame, where it reaches from -1 to 1.
        turn: rotation about the vertical in radians, counter-clockwise from above.
        pitch: rotation about its own first axis, before `turn`.
        gloss: strength of the highlight.
    """

    shape: str
    centre: tuple[float, float, float]
    half: tuple[float, float, float]
    colour: "tuple[float, float, float] | Texture"
    turn: float = 0.0
    pitch: float = 0.0
    gloss: float = 0.0

    def axes(self) -> Array:
        """Its own axes as rows, (3, 3)."""
        c, s = np.cos(self.turn), np.sin(self.turn)
        cp, sp = np.cos(self.pitch), np.sin(self.pitch)
        turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        pitch = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]])
        return (pitch @ turn).astype(np.float32)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera. `right`, `down` and `ahead` are unit vectors; `focal` is in pixels."""

    position: Array
    right: Array
    down: Array
    ahead: Array
    focal: float
    width: int
    height: int
    horizon: float = 0.5  # where the viewing axis meets the image, as a share of its height

    @staticmethod
    def looking_at(
        position: Sequence[float], target: Sequence[float], focal: float, width: int, height: int
    ) -> "Camera":
        """Make a camera without roll."""
        ahead = np.asarray(target, np.float32) - np.asarray(position, np.float32)
        ahead /= np.linalg.norm(ahead)
        right = np.cross(ahead, np.array([0, 0, 1], np.float32))
        right /= np.linalg.norm(right)
        return Camera(np.asarray(position, np.float32), right, np.cross(ahead, right), ahead, focal, width, height)

    def rays(self) -> Array:
        """Return directions of all pixels' rays (height, width, 3), of depth 1."""
        u = (np.arange(self.width, dtype=np.float32) + 0.5 - self.width / 2) / self.focal
        v = (np.arange(self.height, dtype=np.float32) + 0.5 - self.horizon * self.height) / self.focal
        return self.ahead + u[None, :, None] * self.right + v[:, None, None] * self.down

    def project(self, points: Array) -> Array:
        """Project points (n, 3) to (column, row, depth), (n, 3)."""
        offset = np.asarray(points, np.float32) - self.position
        depth = offset @ self.ahead
        column = offset @ self.right / depth * self.focal + self.width / 2
        row = offset @ self.down / depth * self.focal + self.horizon * self.height
        return np.stack([column, row, depth], axis=-1)


@dataclass(frozen=True)
class Light:
    """A sun: the direction towards it, and what it and the sky give."""

    direction: Sequence[float]
    sun: float = 0.7
    sky: float = 0.35


@dataclass(frozen=True)
class Scene:
    """What is to be drawn: solids, a floor at z = 0 if it has a texture, and a background by ray direction."""

    solids: Sequence[Solid]
    background: Texture
    floor: Texture | None = None
    shadows: bool = True


def draw(scene: Scene, camera: Camera, light: Light) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """Draw a scene.

    Returns:
        uint8 (height, width, 3), and int16 (height, width): which solid is seen, -1 for the floor, -2 for neither.
    """
    rays = camera.rays()
    depth = np.full(rays.shape[:2], _FAR)
    seen = np.full(rays.shape[:2], -2, dtype=np.int16)
    normals = np.zeros_like(rays)
    if scene.floor is not None:
        with np.errstate(divide="ignore"):
            floor = -camera.position[2] / rays[..., 2]
        ahead = floor > 0
        depth[ahead], seen[ahead] = floor[ahead], -1
        normals[ahead] = (0, 0, 1)
    for number, solid in enumerate(scene.solids):
        window = _window(camera, solid)
        if window is None:
            continue
        near, far, normal = _hit(solid, camera.position, rays[window])
        front = (near < far) & (near > _EPSILON) & (near < depth[window])
        depth[window][front] = near[front]
        seen[window][front] = number
        normals[window][front] = normal(front)
    return _shade(scene, camera, light, rays, depth, seen, normals), seen


_CORNERS = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)


def _window(camera: Camera, solid: Solid) -> tuple[slice, slice] | None:
    """The pixels that the solid's bounding box can cover; None if there are none."""
    corners = np.asarray(solid.centre, np.float32) + (_CORNERS * np.asarray(solid.half, np.float32)) @ solid.axes()
    column, row, depth = camera.project(corners).T
    if depth.max() <= 0:
        return None
    if depth.min() <= _EPSILON:  # the camera is beside it: anywhere
        return slice(0, camera.height), slice(0, camera.width)
    columns = slice(max(0, int(column.min())), min(camera.width, int(column.max()) + 1))
    rows = slice(max(0, int(row.min())), min(camera.height, int(row.max()) + 1))
    return (rows, columns) if rows.start < rows.stop and columns.start < columns.stop else None


def _hit(solid: Solid, origin: Array, rays: Array) -> tuple[Array, Array, Callable[[NDArray[np.bool_]], Array]]:
    """Depths between which rays (..., 3) from `origin`, one or many, are inside, and the normals where they enter."""
    axes = solid.axes()
    half = np.asarray(solid.half, np.float32)
    o = (origin - np.asarray(solid.centre, np.float32)) @ axes.T / half
    d = rays @ axes.T / half
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "box":
            first, second = (-1 - o) / d, (1 - o) / d
            enter, leave = np.minimum(first, second), np.maximum(first, second)
            # Three slices, because a reduction over so short an axis is slow.
            near = np.maximum(np.maximum(enter[..., 0], enter[..., 1]), enter[..., 2])
            far = np.minimum(np.minimum(leave[..., 0], leave[..., 1]), leave[..., 2])

            def local(mask: NDArray[np.bool_]) -> Array:
                dirs = d[mask]
                n = np.zeros_like(dirs)
                rows, side = np.arange(len(dirs)), enter[mask].argmax(-1)
                n[rows, side] = -np.sign(dirs[rows, side])
                return n

        else:
            used = slice(0, 2) if solid.shape == "cylinder" else slice(0, 3)
            a = _dot(d[..., used], d[..., used])
            b = _dot(np.broadcast_to(o, d.shape)[..., used], d[..., used])
            c = _dot(o[..., used], o[..., used]) - 1
            root = np.sqrt(b * b - a * c)  # NaN where the ray passes by
            near, far = (-b - root) / a, (-b + root) / a
            capped = np.zeros(near.shape, bool)
            if solid.shape == "cylinder":
                first, second = (-1 - o[..., 2]) / d[..., 2], (1 - o[..., 2]) / d[..., 2]
                enter = np.minimum(first, second)
                capped = enter > near
                near, far = np.maximum(near, enter), np.minimum(far, np.maximum(first, second))

            def local(mask: NDArray[np.bool_]) -> Array:
                start = o[mask] if o.ndim > 1 else o
                n = start + near[mask][:, None] * d[mask]
                if solid.shape == "cylinder":
                    n[:, 2] = 0
                    top = capped[mask]
                    n[top] = 0
                    n[top, 2] = -np.sign(d[mask][top, 2])
                return n

    def normal(mask: NDArray[np.bool_]) -> Array:
        return _unit((local(mask) / half) @ axes)

    return near, far, normal


def _shade(
    scene: Scene, camera: Camera, light: Light, rays: Array, depth: Array, seen: NDArray[np.int16], normals: Array
) -> NDArray[np.uint8]:
    image = np.empty(rays.shape, np.float32)
    empty = seen == -2
    image[empty] = scene.background(rays[empty])
    drawn = ~empty
    points = camera.position + depth[drawn][:, None] * rays[drawn]
    normal, which = normals[drawn], seen[drawn]
    sun = _unit(np.asarray(light.direction, np.float32))
    lit = np.clip(normal @ sun, 0, None)
    if scene.shadows:
        lit = np.where(_in_shadow(scene, points + _EPSILON * normal, sun, lit > 0), 0, lit)
    colours = np.empty((len(points), 3), np.float32)
    gloss = np.zeros(len(points), np.float32)
    for number, mine in _groups(which):
        solid = scene.solids[number] if number >= 0 else None
        colours[mine] = scene.floor(points[mine]) if solid is None else _colours(solid, points[mine])
        gloss[mine] = 0 if solid is None else solid.gloss
    # The sky is brighter from above than from below.
    colours *= (light.sky * (0.75 + 0.25 * normal[:, 2]) + light.sun * lit)[:, None]
    shiny = (gloss > 0) & (lit > 0)
    half_way = sun - _unit(rays[drawn][shiny])
    colours[shiny] += (gloss[shiny] * np.clip(_dot(normal[shiny], _unit(half_way)), 0, 1) ** 40)[:, None]
    image[drawn] = colours
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _groups(which: NDArray[np.int16]) -> Iterator[tuple[int, NDArray[np.intp]]]:
    """Every value and where it is."""
    order = np.argsort(which, kind="stable")
    values, starts = np.unique(which[order], return_index=True)
    yield from zip(values, np.split(order, starts[1:]), strict=True)


def _dot(a: Array, b: Array) -> Array:
    return np.einsum("...i,...i", a, b)


def _unit(vectors: Array) -> Array:
    return vectors / np.sqrt(_dot(vectors, vectors))[..., None]


def _colours(solid: Solid, points: Array) -> Array:
    if not callable(solid.colour):
        return np.asarray(solid.colour, np.float32)
    return solid.colour((points - np.asarray(solid.centre, np.float32)) @ solid.axes().T / np.asarray(solid.half))


def _in_shadow(scene: Scene, points: Array, sun: Array, facing: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether a solid stands between a point and the sun. Points that face away are not tested."""
    dark = np.zeros(len(points), bool)
    across = np.linalg.svd(sun[None])[2][1:].astype(np.float32)  # two directions at right angles to the sun's
    u, v = np.ascontiguousarray((points @ across.T).T)
    height = points @ sun
    for solid in scene.solids:
        reach = float(np.linalg.norm(solid.half))
        centre = np.asarray(solid.centre, np.float32)
        cu, cv = across @ centre
        asked = (u - cu) ** 2 + (v - cv) ** 2 < reach**2
        asked &= facing & ~dark & (height < centre @ sun + reach)
        if asked.any():
            near, far, _ = _hit(solid, points[asked], np.broadcast_to(sun, (asked.sum(), 3)))
            dark[asked] = (near < far) & (far > 0)
    return dark
