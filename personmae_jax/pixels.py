"""Images, patches and normalised pixels, and back, as MAE and every export do it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

Statistics = tuple[float, float, float]  # of R, G, B in 0 .. 1


def patchify(
    images: Shaped[Any, "b height width c"], patch: int
) -> Shaped[Any, "b n p"]:
    """Returns square patches in raster order, each flattened as (row, column, channel).

    Works on numpy and jax arrays of any dtype; n = (height // patch) * (width //
    patch), p = c * patch**2.

    Source: the order of `patchify` in facebookresearch/mae, models_mae.py.
    """
    b, height, width, c = images.shape
    rows, columns = height // patch, width // patch
    split = images.reshape(b, rows, patch, columns, patch, c)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(
        b, rows * columns, patch * patch * c
    )


def unpatchify(
    patches: Shaped[Any, "b n p"], grid: tuple[int, int], patch: int
) -> Shaped[Any, "b height width c"]:
    """Inverse of `patchify`; `grid` is (rows, columns)."""
    b, _, p = patches.shape
    rows, columns = grid
    split = patches.reshape(b, rows, columns, patch, patch, p // patch**2)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(
        b, rows * patch, columns * patch, p // patch**2
    )


def normalise(
    pixels: UInt8[Array, "*lead c"], mean: Statistics, std: Statistics
) -> Float[Array, "*lead c"]:
    """Maps uint8 RGB, channels or flattened patches last, to (x/255 - mean) / std."""
    scaled = pixels.astype(jnp.float32) / 255.0
    return (scaled - _repeat(mean, scaled)) / _repeat(std, scaled)


def normalised_patches(
    images: UInt8[Array, "b height width c"],
    patch: int,
    mean: Statistics,
    std: Statistics,
) -> Float[Array, "b n p"]:
    """Patches of whole images, as `patchify` and `normalise` make them."""
    return normalise(patchify(images, patch), mean, std)


def denormalise(
    values: Float[Array, "*lead c"], mean: Statistics, std: Statistics
) -> UInt8[Array, "*lead c"]:
    """The inverse of `normalise`, rounded, and clipped to 0 .. 255."""
    pixels = (values * _repeat(std, values) + _repeat(mean, values)) * 255.0
    return jnp.clip(jnp.round(pixels), 0.0, 255.0).astype(jnp.uint8)


def _repeat(values: Statistics, like: Array) -> np.ndarray:
    row = np.tile(np.asarray(values, np.float32), like.shape[-1] // 3)
    return row.reshape((1,) * (like.ndim - 1) + (-1,))
