"""Images to patches and back, in MAE's order."""

import goldens
import jax
import numpy as np

from personmae_jax.pixels import patchify, unpatchify


def test_patches_are_in_raster_order_each_by_row_column_channel():
    images = np.zeros((1, 4, 6, 3), np.int32)
    y, x, c = np.indices((4, 6, 3))
    images[0] = 100 * y + 10 * x + c
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 12)
    corner = [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]
    np.testing.assert_array_equal(patches[0, 0], corner)
    np.testing.assert_array_equal(patches[0, 1], np.array(corner) + 20)
    np.testing.assert_array_equal(patches[0, 3], np.array(corner) + 200)


def test_unpatchify_is_the_inverse():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 16, 8, 3), np.uint8)
    np.testing.assert_array_equal(unpatchify(patchify(images, 4), (4, 2), 4), images)


def test_numpy_and_jax_agree_and_keep_the_dtype():
    images = goldens.load("personmae")["region_a"]
    on_device = jax.jit(patchify, static_argnums=1)(images, 2)
    assert on_device.dtype == np.uint8
    assert isinstance(patchify(images, 2), np.ndarray)
    np.testing.assert_array_equal(on_device, patchify(images, 2))
