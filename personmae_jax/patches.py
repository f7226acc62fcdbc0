"""Images to rows of patches and back; the order that MAE and every export use."""

from typing import Any

from jaxtyping import Shaped


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
