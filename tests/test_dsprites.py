"""The dSprites renderer against a loop over pixels that is written another way round.

The renderer tests the heart by angle, in the sprite's frame; here the heart is carried onto the canvas and
tested by the even-odd rule.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path

from vtab_tasks.render import dsprites

SIDES = (3, 6, 40, 32, 32)


def latents(*rows: tuple[int, int, int, int, int]) -> dsprites.Latents:
    return dsprites.Latents(*np.array(rows, dtype=np.int64).T)


def heart_on_canvas(scale: int, orientation: int, x: int, y: int) -> list[tuple[float, float]]:
    """The 240 corners in pixels, by the inverse of the rotation given in the dataset's description."""
    s, phi = 0.5 + scale / 10, math.tau * orientation / 39
    corners = []
    for k in range(240):
        t = math.tau * k / 240
        u = 7.357 * math.sin(t) - 2.255 * math.sin(3 * t) - 0.015 * math.sin(5 * t)
        v = -1.613 + sum(
            factor * math.cos(n * t) for n, factor in enumerate((-8.575, 3.099, 1.247, 0.629, 0.010), start=1)
        )
        px = 16 + 32 * x / 31 + s * (math.cos(phi) * u + math.sin(phi) * v)
        py = 16 + 32 * y / 31 + s * (math.cos(phi) * v - math.sin(phi) * u)
        corners.append((px, py))
    return corners


def even_odd(px: float, py: float, corners: list[tuple[float, float]]) -> bool:
    inside = False
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (ay > py) != (by > py) and px < ax + (py - ay) * (bx - ax) / (by - ay):
            inside = not inside
    return inside


def slow(shape: int, scale: int, orientation: int, x: int, y: int) -> np.ndarray:
    """One image, pixel by pixel."""
    s, phi = 0.5 + scale / 10, math.tau * orientation / 39
    cx, cy = 16 + 32 * x / 31, 16 + 32 * y / 31
    corners = heart_on_canvas(scale, orientation, x, y)
    rows = [py for _, py in corners]
    image = np.zeros((64, 64), dtype=np.uint8)
    for j in range(64):
        for i in range(64):
            px, py = i + 0.5, j + 0.5
            # Lengths of the pixel's offset along the sprite's own axes.
            u = ((px - cx) * math.cos(phi) - (py - cy) * math.sin(phi)) / s
            v = ((px - cx) * math.sin(phi) + (py - cy) * math.cos(phi)) / s
            if shape == 0:
                image[j, i] = max(abs(u), abs(v)) < 9.6
            elif shape == 1:
                image[j, i] = math.hypot(u / 12.76, v / 7.22) < 1
            elif min(rows) < py < max(rows) and abs(px - cx) < 12:
                image[j, i] = even_odd(px, py, corners)
    return image


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.tuples(*(st.integers(0, side - 1) for side in SIDES)))
def test_every_pixel_equals_the_slow_loop(row):
    assert np.array_equal(dsprites.draw(latents(row))[0], slow(*row))


@pytest.mark.parametrize("shape", range(3))
def test_corners_of_the_canvas(shape):
    """The largest sprites, at the extremes: nothing is cut off. Square 5, 0, 5 reaches 14 pixels far."""
    rows = [(shape, 5, k, x, y) for k in (0, 5) for x in (0, 31) for y in (0, 5, 31)]
    for row, image in zip(rows, dsprites.draw(latents(*rows)), strict=True):
        assert np.array_equal(image, slow(*row))


def test_hearts_equal_matplotlib():
    """Matplotlib's own point-in-polygon, for every scale and orientation."""
    centres = np.stack(np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5), axis=-1).reshape(-1, 2)
    rows = [(2, scale, k, (7 * k) % 32, (11 * k + scale) % 32) for scale in range(6) for k in range(40)]
    for row, image in zip(rows, dsprites.draw(latents(*rows)), strict=True):
        inside = Path([*heart_on_canvas(*row[1:]), (0, 0)], closed=True).contains_points(centres)
        assert np.array_equal(image, inside.reshape(64, 64))


def test_rays_from_the_middle_leave_the_heart_once():
    """What testing a single edge rests on: every edge turns the same way around the origin."""
    corners = dsprites.heart_outline()
    following = np.roll(corners, -1, axis=0)
    turns = corners[:, 0] * following[:, 1] - corners[:, 1] * following[:, 0]
    assert corners.shape == (240, 2) and turns.min() > 0.01


def test_rows_run_through_the_latents_in_the_order_of_the_file():
    expected = {}
    row = 0
    for shape in range(3):
        for scale in range(6):
            for k in range(40):
                expected[row] = (shape, scale, k)
                row += 32 * 32
    some = np.array([first + 32 * x + y for first in expected for x, y in ((0, 0), (3, 31), (31, 3))])
    found = dsprites.latents_of(some)
    for i, value in enumerate(some.tolist()):
        assert (found.shape[i], found.scale[i], found.orientation[i]) == expected[value - value % 1024]
        assert (found.x[i], found.y[i]) == divmod(value % 1024, 32)
    assert row == 737_280


def test_first_and_last_orientation_are_the_same_picture():
    for shape in range(3):
        first, last = dsprites.draw(latents((shape, 4, 0, 9, 20), (shape, 4, 39, 9, 20)))
        assert np.array_equal(first, last)


def test_many_images_equal_one_by_one():
    """Chunks and the mixture of shapes make no difference."""
    rows = np.random.default_rng(0).integers(0, 737_280, size=1100)
    together = dsprites.draw(dsprites.latents_of(rows))
    assert together.dtype == np.uint8 and together.shape == (1100, 64, 64)
    assert set(np.unique(together)) == {0, 1}
    for i in (0, 1, 511, 512, 1023, 1024, 1099):
        assert np.array_equal(together[i], dsprites.draw(dsprites.latents_of(rows[i : i + 1]))[0])
    assert dsprites.draw(dsprites.latents_of(rows[:0])).shape == (0, 64, 64)


def test_orientation_turns_counter_clockwise_and_x_goes_right():
    """A heart turned by about 90 degrees points to the right; x and y move right and down."""
    turned = dsprites.draw(latents((2, 5, 10, 15, 15)))[0]
    columns = np.nonzero(turned.any(axis=0))[0]
    assert turned[:, columns[-1]].sum() < turned[:, columns[0]].sum()
    left, right, low = dsprites.draw(latents((0, 0, 0, 0, 0), (0, 0, 0, 31, 0), (0, 0, 0, 0, 31)))
    assert np.array_equal(np.roll(left, 32, axis=1), right)
    assert np.array_equal(np.roll(left, 32, axis=0), low)
