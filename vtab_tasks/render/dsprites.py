"""dSprites drawn from its latents.

The dataset, github.com/google-deepmind/dsprites-dataset, holds every combination of 3 shapes, 6 scales,
40 orientations, 32 horizontal and 32 vertical positions once, as 64x64 pixels of 0 and 1. Its author drew
vectors without anti-aliasing. The geometry below was measured from the 320 original frames of the animation
in that repository; 272 of them come out pixel by pixel, the worst is 4 pixels off, the mean 0.23.

A pixel is on if its centre lies inside the sprite. u and v are a pixel's coordinates in the frame of the
sprite at scale 1: origin in its middle, v down.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SIZE = 64
GRID = (3, 6, 40, 32, 32)  # shape, scale, orientation, x, y; y runs fastest

_REACH = 14  # pixels from a sprite's middle to its window's edge; the square reaches 9.6 * sqrt(2) = 13.6
_CHUNK = 512  # images drawn at a time, so that the working arrays stay in the processor's cache


class Latents(NamedTuple):
    """Class indices of n images, int64 (n,) each, in the order of `GRID`."""

    shape: NDArray[np.int64]
    scale: NDArray[np.int64]
    orientation: NDArray[np.int64]
    x: NDArray[np.int64]
    y: NDArray[np.int64]


def latents_of(rows: NDArray[np.integer]) -> Latents:
    """Return the latents of rows 0, ..., 737279 of the dataset."""
    return Latents(*np.unravel_index(rows, GRID))


def draw(latents: Latents) -> NDArray[np.uint8]:
    """Draw sprites.

    Args:
        latents: class indices, (n,) each.

    Returns:
        uint8 (n, 64, 64), rows from the top, values 0 and 1.
    """
    images = np.zeros((len(latents.shape), SIZE, SIZE), dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        _draw_chunk(Latents(*(latent[chunk] for latent in latents)), images[chunk])
    return images


def _draw_chunk(latents: Latents, images: NDArray[np.uint8]) -> None:
    """Draw into `images`, each sprite inside a small window around it."""
    columns, dx = _window(latents.x)
    rows, dy = _window(latents.y)
    angle = 2 * np.pi * latents.orientation / 39  # 0 and 39 are the same picture
    scale = 0.5 + 0.1 * latents.scale
    cos = (np.cos(angle) / scale)[:, None, None]
    sin = (np.sin(angle) / scale)[:, None, None]
    u = cos * dx[:, None, :] - sin * dy[:, :, None]
    v = sin * dx[:, None, :] + cos * dy[:, :, None]
    for shape, inside in enumerate((_in_square, _in_ellipse, _in_heart)):
        (which,) = np.nonzero(latents.shape == shape)
        pixels = which[:, None, None], rows[which][:, :, None], columns[which][:, None, :]
        images[pixels] = inside(u[which], v[which])


def _window(position: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pixels near the sprite's middle along one axis, and their centres' distances from it, (n, 29) each.

    The middle moves from pixel 16 to pixel 48 of 64, so that the window never leaves the canvas.
    """
    middle = 16 + 32 * position / 31
    pixels = np.floor(middle).astype(np.int64)[:, None] + np.arange(-_REACH, _REACH + 1)
    return pixels, pixels + 0.5 - middle[:, None]


def _in_square(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (np.abs(u) < 9.6) & (np.abs(v) < 9.6)


def _in_ellipse(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    return (u / 12.76) ** 2 + (v / 7.22) ** 2 < 1


def heart_outline() -> NDArray[np.float64]:
    """Return the heart's 240 corners (u, v), float64 (240, 2), by increasing angle around the origin."""
    t = np.linspace(0, 2 * np.pi, 240, endpoint=False)
    u = 7.357 * np.sin(t) - 2.255 * np.sin(3 * t) - 0.015 * np.sin(5 * t)
    v = -1.613 - 8.575 * np.cos(t) + 3.099 * np.cos(2 * t) + 1.247 * np.cos(3 * t)
    v += 0.629 * np.cos(4 * t) + 0.010 * np.cos(5 * t)
    corners = np.stack([u, v], axis=1)
    return corners[np.argsort(np.arctan2(v, u))]


_CORNERS = heart_outline()
_ANGLES = np.arctan2(_CORNERS[:, 1], _CORNERS[:, 0])
_EDGES = np.roll(_CORNERS, -1, axis=0) - _CORNERS


def _in_heart(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Inside the polygon. Every ray from the origin crosses it once, so one edge decides about a point."""
    # Below the first angle this gives -1, the edge that closes the polygon.
    edge = np.searchsorted(_ANGLES, np.arctan2(v, u), side="right") - 1
    corner_u, corner_v = _CORNERS[:, 0][edge], _CORNERS[:, 1][edge]
    edge_u, edge_v = _EDGES[:, 0][edge], _EDGES[:, 1][edge]
    return edge_u * (v - corner_v) - edge_v * (u - corner_u) > 0
