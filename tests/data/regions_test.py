"""Promises about where RegionA and RegionB lie."""

import math

import numpy as np
import pytest

from personmae_jax.config import RegionsConfig
from personmae_jax.data.images import Box
from personmae_jax.data.regions import (
    NUM_DRAWS,
    relative_geometry,
    sample_regions,
)
from personmae_jax.data.rng import BatchRng, Stream

_GRID = (16, 8)


def _draws(cfg: RegionsConfig, num: int = 2000, size=(288, 190)):
    numbers = BatchRng(0, range(num)).uniform(Stream.REGIONS, NUM_DRAWS)
    return [sample_regions(row, *size, cfg, 256, 128) for row in numbers]


def _centres(box_a: Box, box_b: Box):
    """Centres of B's patches on A's grid, by the documented formula."""
    y_offset, x_offset, y_scale, x_scale = relative_geometry(box_a, box_b, _GRID)
    return (
        (np.arange(_GRID[0]) + 0.5) * y_scale + y_offset - 0.5,
        (np.arange(_GRID[1]) + 0.5) * x_scale + x_offset - 0.5,
    )


def test_boxes_lie_inside_the_image():
    for size in ((288, 190), (8, 8), (500, 40), (40, 500), (1, 1)):
        for box in sum((draw[:2] for draw in _draws(RegionsConfig(), 200, size)), ()):
            assert box.y >= 0
            assert box.x >= 0
            assert box.height >= 1
            assert box.width >= 1
            assert box.y + box.height <= size[0]
            assert box.x + box.width <= size[1]


def test_area_and_aspect_fill_their_ranges_and_keep_them():
    cfg = RegionsConfig(min_area=0.5, max_area=0.9, nested=0.0)
    boxes = np.array([draw.box_b for draw in _draws(cfg)])
    areas = boxes[:, 2] * boxes[:, 3] / (288 * 190)
    aspects = boxes[:, 3] / boxes[:, 2] / (128 / 256)
    # A side is rounded to whole pixels: half a pixel of 100, on either side.
    assert 0.495 < areas.min() < 0.51
    assert 0.85 < areas.max() < 0.905
    assert 0.745 < aspects.min() < 0.76
    assert 1.3 < aspects.max() < 1.345
    # Log-uniform, but for the rejections: a half of the log range, not of the range.
    wide = _draws(RegionsConfig(min_area=0.1, max_area=0.15, nested=0.0))
    log_aspects = [math.log(2 * a.width / a.height) for a, _, _ in wide]
    assert abs(np.mean(log_aspects)) < 0.02


def test_an_image_of_another_shape_gives_the_largest_centred_box():
    box = _draws(RegionsConfig(min_area=0.9), 1, (300, 90))[0].box_a
    assert box == Box(30, 0, 240, 90)  # w/h 0.375, the least allowed
    box = _draws(RegionsConfig(min_area=0.9), 1, (90, 300))[0].box_a
    assert box == Box(0, 120, 90, 60)  # 2/3, the most


def test_regions_are_independent_and_same_makes_them_equal():
    apart = RegionsConfig(nested=0.0, min_area=0.5)
    assert all(a != b for a, b, _ in _draws(apart, 50))
    assert all(a == b for a, b, _ in _draws(RegionsConfig(same=True), 50))


def _is_inside(a: Box, b: Box) -> bool:
    return (
        a.y <= b.y
        and a.x <= b.x
        and b.y + b.height <= a.y + a.height
        and b.x + b.width <= a.x + a.width
    )


def test_a_nested_region_lies_in_region_a_with_its_share_of_the_area():
    draws = _draws(RegionsConfig(nested=1.0, min_area=0.8))
    assert all(_is_inside(a, b) for a, b, _ in draws)
    shares = [b.height * b.width / (a.height * a.width) for a, b, _ in draws]
    # Sides are rounded to whole pixels; a B that does not fit keeps its aspect.
    assert 0.39 < min(shares) < 0.41
    assert np.mean(np.array(shares) > 0.81) < 0.01
    # Uniform but for the rejections: wide and large ones do not fit.
    assert np.mean(shares) == pytest.approx(0.58, abs=0.02)


def test_a_share_of_region_b_is_nested_and_the_others_are_as_without():
    independent = _draws(RegionsConfig(nested=0.0))
    some = _draws(RegionsConfig(nested=0.7))
    changed = [a != b for a, b in zip(independent, some, strict=True)]
    assert np.mean(changed) == pytest.approx(0.7, abs=0.03)
    for old, new in zip(independent, some, strict=True):
        assert old.box_a == new.box_a
        assert old == new or _is_inside(new.box_a, new.box_b)


def test_flip_has_its_probability():
    assert np.mean([d.is_flipped for d in _draws(RegionsConfig())]) == pytest.approx(
        0.5, abs=0.05
    )
    assert all(d.is_flipped for d in _draws(RegionsConfig(flip_probability=1.0), 50))
    never = _draws(RegionsConfig(flip_probability=0.0), 50)
    assert not any(d.is_flipped for d in never)


def test_same_region_has_exactly_its_own_coordinates():
    box = Box(7, 3, 251, 113)
    geometry = relative_geometry(box, box, _GRID)
    assert geometry.dtype == np.float32
    np.testing.assert_array_equal(geometry, (0, 0, 1, 1))
    for centres, num in zip(_centres(box, box), _GRID, strict=True):
        np.testing.assert_array_equal(centres, np.arange(num))


def test_moving_b_moves_its_coordinates_by_as_many_patches():
    box_a = Box(10, 20, 160, 80)  # patches of 10 x 10 pixels
    rows, columns = _centres(box_a, Box(10, 20, 120, 40))
    moved_rows, moved_columns = _centres(box_a, Box(40, 25, 120, 40))
    np.testing.assert_allclose(moved_rows - rows, 3, atol=1e-6)
    np.testing.assert_allclose(moved_columns - columns, 0.5, atol=1e-6)


def test_coordinates_point_at_the_same_pixels():
    box_a, box_b = Box(10, 20, 160, 80), Box(37, 5, 93, 71)
    for axis, centres in enumerate(_centres(box_a, box_b)):
        # The pixel position of each centre, once in B and once in A.
        in_b = box_b[axis] + (np.arange(_GRID[axis]) + 0.5) * (
            box_b[axis + 2] / _GRID[axis]
        )
        in_a = box_a[axis] + (centres + 0.5) * (box_a[axis + 2] / _GRID[axis])
        np.testing.assert_allclose(in_a, in_b, rtol=1e-5)
