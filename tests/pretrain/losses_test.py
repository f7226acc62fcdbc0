"""Targets and losses against PyTorch's numbers and against hand-computed ones."""

import goldens
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax import pixels
from personmae_jax.config import DataConfig
from personmae_jax.pixels import patchify
from personmae_jax.pretrain import losses

MEAN, STD = DataConfig().mean, DataConfig().std


@pytest.fixture(autouse=True)
def _strict_promotion():
    """No loss may mix dtypes unseen."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="module")
def arrays():
    return goldens.load("personmae")


def tokens(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_normalise_takes_imagenets_statistics_off_each_channel():
    values = jnp.array([[0, 128, 255], [255, 0, 1]], jnp.uint8)
    expected = (np.array(values) / 255 - MEAN) / STD
    np.testing.assert_allclose(
        pixels.normalise(values, MEAN, STD), expected, rtol=1e-6, atol=1e-6
    )


def test_normalising_patches_is_normalising_images():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 4, 3), np.uint8)
    whole = pixels.normalise(jnp.asarray(images), MEAN, STD)
    patches = pixels.normalise(jnp.asarray(patchify(images, 2)), MEAN, STD)
    np.testing.assert_array_equal(patches, patchify(whole, 2))


def test_denormalise_gives_every_pixel_value_back():
    values = jnp.arange(256, dtype=jnp.uint8)[:, None] * jnp.ones((1, 6), jnp.uint8)
    back = pixels.denormalise(pixels.normalise(values, MEAN, STD), MEAN, STD)
    np.testing.assert_array_equal(back, values)
    extremes = pixels.denormalise(jnp.array([[-9.0] * 3, [9.0] * 3]), MEAN, STD)
    np.testing.assert_array_equal(extremes, [[0] * 3, [255] * 3])


def test_pixel_target_is_maes(arrays):
    patches = pixels.normalise(jnp.asarray(patchify(arrays["region_a"], 2)), MEAN, STD)
    mean, std = losses.patch_moments(patches)
    # Pixels of order 1 in float32, divided by a deviation of order 1.
    np.testing.assert_allclose(
        (patches - mean) / std, arrays["mae_target"], rtol=0, atol=2e-6
    )


def test_pixel_loss_is_maes_with_every_patch_counted(arrays):
    patches = pixels.normalise(jnp.asarray(patchify(arrays["region_b"], 2)), MEAN, STD)
    predicted = jnp.asarray(arrays["pixels"], jnp.float32)
    np.testing.assert_allclose(
        losses.pixel_loss(predicted, patches), arrays["pixel_loss"], rtol=1e-6
    )


def test_pixel_loss_of_a_perfect_prediction_is_zero():
    patches = tokens(2, 3, 12)
    mean, std = losses.patch_moments(patches)
    assert losses.pixel_loss((patches - mean) / std, patches) == 0.0
    assert losses.pixel_loss(patches, patches, "raw") == 0.0


def test_raw_pixel_loss_is_the_mean_square_of_the_difference():
    patches = tokens(2, 3, 12)
    np.testing.assert_allclose(
        losses.pixel_loss(patches + 0.5, patches, "raw"), 0.25, rtol=1e-6
    )


def test_weights_choose_whose_error_counts():
    patches, errors = tokens(2, 3, 12), jnp.array([[1.0, 2, 3], [4, 5, 6]])
    predicted = patches + errors[..., None]
    weights = jnp.array([[0.0, 1, 0], [0, 0, 0.5]])
    np.testing.assert_allclose(
        losses.pixel_loss(predicted, patches, "raw", weights),
        (2**2 + 0.5 * 6**2) / 1.5,
        rtol=1e-6,
    )


GRID = (4, 2)


def shares(geometry, *visible):
    geometry = jnp.asarray([geometry], jnp.float32)
    return losses.visible_share(geometry, jnp.array([visible]), GRID)[0]


def test_where_b_is_a_just_the_visible_patches_are_shown():
    np.testing.assert_array_equal(
        shares((0, 0, 1, 1), 0, 3, 6), [1, 0, 0, 1, 0, 0, 1, 0]
    )


def test_a_patch_of_b_is_shown_by_the_share_of_its_area():
    # Half a patch down: every patch of B lies in two rows of A, the last row outside.
    np.testing.assert_allclose(
        shares((0.5, 0, 1, 1), 0, 4, 7), [0.5, 0, 0.5, 0, 0.5, 0.5, 0, 0.5]
    )
    # The upper left quarter of A: four patches of B for each one of A.
    np.testing.assert_allclose(shares((0, 0, 0.5, 0.5), 2), [0, 0, 0, 0, 1, 1, 1, 1])


def test_what_lies_outside_a_is_not_shown():
    np.testing.assert_array_equal(shares((9, 0, 1, 1), *range(8)), np.zeros(8))
    np.testing.assert_allclose(
        shares((0, -1, 1, 3), *range(8)), np.tile([2 / 3, 0], 4), rtol=1e-6
    )


def test_a_patch_of_one_colour_has_target_zero_not_nan():
    patches = jnp.full((1, 2, 12), 0.3)
    # 12 equal float32 numbers: the mean rounds to 3e-8, over a deviation of 1e-3.
    assert losses.pixel_loss(jnp.zeros((1, 2, 12)), patches) < 1e-8


def test_feature_loss_is_the_mean_square_of_normalised_tokens(arrays):
    predicted = jnp.asarray(arrays["features"], jnp.float32)
    target = jnp.asarray(arrays["feature_target"], jnp.float32)
    np.testing.assert_allclose(
        losses.feature_loss(predicted, target), arrays["feature_loss"], rtol=1e-5
    )


def test_feature_loss_of_the_target_itself_is_zero():
    target = losses.feature_target([tokens(2, 3, 64)])
    assert abs(losses.feature_loss(5.0 * target + 2.0, target)) < 1e-6


def test_feature_loss_of_the_opposite_by_hand():
    target = jnp.tile(jnp.array([1.0, -1.0]), 8).reshape(1, 1, 16)
    # Errors -2 and 2 in each channel.
    np.testing.assert_allclose(
        losses.feature_loss(-3.0 * target, target), 4.0, rtol=1e-5
    )


def test_feature_target_is_float32_whatever_the_teacher_computes_in():
    target = losses.feature_target([tokens(2, 3, 8).astype(jnp.bfloat16)])
    assert target.dtype == jnp.float32


def test_the_target_of_several_blocks_is_that_of_their_mean_by_hand():
    blocks = [tokens(2, 3, 8, seed=seed) for seed in range(3)]
    mean = np.mean(blocks, axis=0)
    mean -= mean.mean(-1, keepdims=True)
    expected = mean / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(losses.feature_target(blocks), expected, atol=1e-5)


def test_instance_norm_takes_what_all_patches_of_an_image_share_off_each_block():
    """As data2vec 2.0's: `instance_norm` of (b, d, n), the mean, then `layer_norm`."""
    blocks = [np.float64(tokens(2, 6, 8, seed=seed)) for seed in range(2)]
    expected = 0.0
    for x in blocks:
        x = x - x.mean(axis=1, keepdims=True)
        expected += x / np.sqrt(x.var(axis=1, keepdims=True) + 1e-6) / 2
    expected -= expected.mean(-1, keepdims=True)
    expected /= np.sqrt(expected.var(-1, keepdims=True) + 1e-6)
    shared = jnp.linspace(-50, 50, 8)[None, None]
    given = [jnp.asarray(x, jnp.float32) + shared for x in blocks]
    # Float32 tokens of order 50 and a spread of order 1.
    np.testing.assert_allclose(
        losses.feature_target(given, instance_norm=True), expected, atol=1e-4
    )


def test_the_cls_target_is_the_normalised_mean_over_patches_and_blocks():
    blocks = [tokens(2, 3, 8, seed=seed) for seed in range(2)]
    mean = np.mean(blocks, axis=(0, 2))
    mean -= mean.mean(-1, keepdims=True)
    expected = mean / np.sqrt(mean.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(losses.cls_target(blocks), expected, atol=1e-5)


def test_a_teacher_that_says_the_same_of_every_image_has_std_zero():
    target = jnp.tile(losses.feature_target([tokens(1, 5, 16)]), (4, 1, 1))
    assert losses.target_statistics(target, jnp.float32(0.5))["teacher_std"] < 1e-6


def test_teacher_std_by_hand():
    # Two images, one position: channels (1, -1) and (-1, 1) have deviation 1 each.
    target = jnp.array([[[1.0, -1.0]], [[-1.0, 1.0]]])
    statistics = losses.target_statistics(target, jnp.float32(0.0))
    np.testing.assert_allclose(statistics["teacher_std"], 1.0)


def test_teacher_std_does_not_count_what_differs_between_positions():
    target = jnp.tile(jnp.array([[[1.0, -1.0], [-1.0, 1.0]]]), (3, 1, 1))
    statistics = losses.target_statistics(target, jnp.float32(0.0))
    assert statistics["teacher_std"] == 0.0


def test_a_learned_constant_explains_nothing_and_perfection_everything():
    target = losses.feature_target([tokens(4, 5, 16)])
    constant = jnp.mean(target, axis=(0, 1), keepdims=True)
    for guess, explained in ((constant, 0.0), (target, 1.0)):
        mse = jnp.mean(jnp.square(target - guess))
        statistics = losses.target_statistics(target, mse)
        np.testing.assert_allclose(
            statistics["feature_explained"], explained, atol=1e-6
        )


def test_a_collapsed_target_gives_finite_numbers():
    statistics = losses.target_statistics(jnp.zeros((4, 5, 16)), jnp.float32(0.0))
    assert all(np.isfinite(x) for x in statistics.values())
