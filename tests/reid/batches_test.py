"""Promises about how a training image is changed."""

import numpy as np
import pytest

from personmae_jax.config_finetune import AugmentConfig
from personmae_jax.reid.batches import augment


def augmented(numbers, **settings):
    cfg = AugmentConfig(padding=2)
    for name, value in settings.items():
        setattr(cfg, name, value)
    rows, columns = np.mgrid[1:33, 1:17]
    pixels = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    plain = pixels.copy()
    statistics = ((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    augment(pixels, np.array(numbers), np.random.default_rng(0), cfg, statistics)
    return plain, pixels


def test_an_image_is_flipped_or_not_by_its_number():
    plain, pixels = augmented([0.49, 0, 0, 1, 0, 0, 0, 0], padding=0)
    np.testing.assert_array_equal(pixels, plain[:, ::-1])
    plain, pixels = augmented([0.5, 0, 0, 1, 0, 0, 0, 0], padding=0)
    np.testing.assert_array_equal(pixels, plain)


def test_the_crop_of_the_padded_image_reaches_every_corner_and_fills_with_black():
    plain, pixels = augmented([1, 0, 0.999, 1, 0, 0, 0, 0], padding=2)
    np.testing.assert_array_equal(pixels[2:, :-2], plain[:-2, 2:])
    assert not pixels[:2].any()
    assert not pixels[:, -2:].any()
    plain, pixels = augmented([1, 0.5, 0.5, 1, 0, 0, 0, 0], padding=2)
    np.testing.assert_array_equal(pixels, plain)


@pytest.mark.parametrize("area", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("aspect", [0.0, 0.5, 0.999])
def test_the_erased_rectangle_has_its_area_and_aspect_unless_clipped(area, aspect):
    numbers = [1, 0, 0, 0, area, aspect, 0.5, 0.5]
    plain, pixels = augmented(numbers, padding=0)
    changed = (plain != pixels).any(axis=2)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    h, w = np.ptp(rows) + 1, np.ptp(columns) + 1
    share = 0.02 + area * (1 / 3 - 0.02)
    ratio = 0.3 ** (1 - 2 * aspect)
    assert abs(h - min(32, np.sqrt(share * 512 * ratio))) <= 1
    assert abs(w - min(16, np.sqrt(share * 512 / ratio))) <= 1


def test_what_is_erased_is_noise_of_the_pixels_own_statistics():
    values = []
    for seed in range(200):
        pixels = np.zeros((32, 16, 3), np.uint8)
        numbers = np.array([1, 0, 0, 0, 0.5, 0.5, 0.0, 0.0])
        cfg, rng = AugmentConfig(padding=2), np.random.default_rng(seed)
        cfg.padding = 0
        augment(pixels, numbers, rng, cfg, ((0.5, 0.4, 0.6), (0.1, 0.1, 0.1)))
        values.append(pixels[:8, :8].reshape(-1, 3) / 255)
    mean, std = np.concatenate(values).mean(0), np.concatenate(values).std(0)
    np.testing.assert_allclose(mean, (0.5, 0.4, 0.6), atol=0.01)
    np.testing.assert_allclose(std, (0.1, 0.1, 0.1), atol=0.01)
