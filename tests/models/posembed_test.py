"""Position codes against MAE's table and against plain geometry."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax.data import images, regions
from personmae_jax.models import posembed


def centres(box_a, box_b, grid):
    """(y, x) of RegionB's patches on RegionA's grid, n 2."""
    geometry = jnp.asarray(regions.relative_geometry(box_a, box_b, grid))
    return posembed.region_b_coordinates(geometry[None], grid)[0]


# The device's sin and cos of angles up to 24: an ulp of 24 in float32 is 1.9e-6.
ATOL = 2e-6


def test_table_is_maes_without_its_cls_row():
    table = goldens.load("positions")["table"]
    assert not table[0].any()
    np.testing.assert_array_equal(posembed.position_table((16, 8), 32), table[1:])


def test_coordinates_are_yx_in_raster_order():
    coordinates = posembed.grid_coordinates((2, 3))
    expected = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    np.testing.assert_array_equal(coordinates, np.array(expected, np.float32))


@pytest.mark.parametrize("grid", [(16, 8), (24, 8), (4, 2)])
def test_queries_lie_exactly_on_maes_grid_when_b_is_a(grid):
    box = images.Box(13, 7, 171, 83)
    coordinates = centres(box, box, grid)
    np.testing.assert_array_equal(coordinates, posembed.grid_coordinates(grid))
    codes = posembed.sine_cosine(coordinates, 32)
    table = posembed.position_table(grid, 32)
    np.testing.assert_allclose(codes, table, rtol=0, atol=ATOL)


@pytest.mark.parametrize(("rows", "columns"), [(3, 0), (-2, 1), (0, -1)])
def test_moving_b_by_patches_moves_its_queries_by_as_many(rows, columns):
    grid, patch = (16, 8), 11  # pixels of the image under one patch of A
    box_a = images.Box(40, 30, 16 * patch, 8 * patch)
    box_b = images.Box(50, 35, 13 * patch, 7 * patch)
    moved = box_b._replace(y=box_b.y + rows * patch, x=box_b.x + columns * patch)
    before, after = (centres(box_a, box, grid) for box in (box_b, moved))
    # Coordinates up to 16 in float32: an ulp is 1e-6.
    np.testing.assert_allclose(
        after - before, np.tile([rows, columns], (128, 1)), rtol=0, atol=4e-6
    )


def test_a_whole_patch_further_is_the_next_row_of_the_table():
    grid, box_a = (6, 4), images.Box(0, 0, 60, 40)
    codes = posembed.sine_cosine(centres(box_a, box_a._replace(y=10), grid), 16)
    table = posembed.position_table(grid, 16)
    np.testing.assert_allclose(codes[:-4], table[4:], rtol=0, atol=ATOL)


def test_a_smaller_b_has_its_queries_inside_a():
    box_a, box_b = images.Box(0, 0, 160, 80), images.Box(40, 20, 80, 40)
    coordinates = centres(box_a, box_b, (16, 8))
    # B covers A's rows 4 .. 11 and columns 2 .. 5, at half a patch a step.
    np.testing.assert_allclose(coordinates[0], [3.75, 1.75])
    np.testing.assert_allclose(coordinates[-1], [11.25, 5.25])


def test_codes_are_float32_without_implicit_promotion():
    with jax.numpy_dtype_promotion("strict"):
        coordinates = jnp.asarray(posembed.grid_coordinates((4, 2)))
        assert posembed.sine_cosine(coordinates, 8).dtype == np.float32
        geometry = jnp.ones((3, 4), np.float32)
        assert posembed.region_b_coordinates(geometry, (4, 2)).dtype == np.float32
