"""Fixed sine-cosine position embeddings at any coordinates of a patch grid."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def sine_cosine(
    coordinates: Float[Array | np.ndarray, "*lead 2"], width: int
) -> Float[Array | np.ndarray, "*lead {width}"]:
    """Codes positions given as (y, x) in units of patches, at patch centres.

    The first half of the width codes x, the second y; each is sines, then cosines,
    of the coordinate times 10000 ** (-i / (width / 4)). Numpy in, numpy out.

    Source: `get_2d_sincos_pos_embed` in facebookresearch/mae, util/pos_embed.py.
    """
    xp = np if isinstance(coordinates, np.ndarray) else jnp
    quarter = width // 4
    omega = 10000.0 ** (-np.arange(quarter) / quarter)
    omega = omega.astype(coordinates.dtype).reshape(
        (1,) * (coordinates.ndim - 1) + (-1,)
    )
    y, x = coordinates[..., :1] * omega, coordinates[..., 1:] * omega
    return xp.concatenate([xp.sin(x), xp.cos(x), xp.sin(y), xp.cos(y)], axis=-1)


def grid_coordinates(grid: tuple[int, int]) -> Float[np.ndarray, "n 2"]:
    """Returns (y, x) of every patch of a (rows, columns) grid in raster order."""
    rows, columns = grid
    y, x = np.mgrid[:rows, :columns]
    return np.stack([y.ravel(), x.ravel()], axis=-1).astype(np.float32)


def region_b_coordinates(
    geometry: Float[Array, "b 4"], grid: tuple[int, int]
) -> Float[Array, "b n 2"]:
    """Centres of RegionB's patches in RegionA's patch-grid coordinates.

    Args:
      geometry: (y_offset, x_offset, y_scale, x_scale) of `regions.relative_geometry`:
        the centre of patch row i lies at (i + 0.5) * y_scale + y_offset - 0.5.
      grid: Rows and columns of either region.

    Returns:
      (y, x) in patches; `grid_coordinates(grid)` where RegionB is RegionA.
    """
    offset, scale = geometry[:, None, :2], geometry[:, None, 2:]
    return (grid_coordinates(grid)[None] + 0.5) * scale + offset - 0.5


def position_table(
    grid: tuple[int, int], width: int, *, at: tuple[int, int] | None = None
) -> Float[np.ndarray, "n {width}"]:
    """Codes of the patches of a whole grid, without the cls row (which is zeros).

    Computed in float64 and rounded to float32, as MAE does.

    Args:
      grid: Rows and columns whose coordinates are coded.
      width: Of the embeddings.
      at: Rows and columns of another grid over the same image: its patch centres in
        the coordinates of `grid`. By default `grid` itself.
    """
    at = grid if at is None else at
    scale = np.divide(grid, at)[None]  # 1 / 1 leaves whole numbers as they are
    centres = (grid_coordinates(at).astype(np.float64) + 0.5) * scale - 0.5
    return sine_cosine(centres, width).astype(np.float32)
