"""The positions in a PyTorch ViT's file: which grid they are for, and on another."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32

from personmae_jax.config import ModelConfig
from personmae_jax.config_check import MAX_PATCHES
from personmae_jax.errors import ConfigError
from personmae_jax.pytorch import weights

Grid = tuple[int, int]

# Largest difference of a sine-cosine table from ours: some compute it in float32, and
# some files are of half precision.
_TOLERANCE = {"float32": 1e-4, "float64": 1e-4, "float16": 1e-3, "bfloat16": 5e-3}
# Height and width of the grids that ViTs are pretrained on; 4:3 is 256 x 192 pixels.
_RATIOS = ((1, 1), (2, 1), (3, 1), (4, 3))


def choose_positions(
    table: Float32[np.ndarray, "1 t d"],
    dtype: str,
    meta: Mapping[str, Any],
    cfg: ModelConfig,
) -> tuple[np.ndarray, str]:
    """Returns the positions to start from, with the cls row, and a note on them.

    `meta` is what the file, whose table and dtype these are, says of itself.

    Raises:
      ConfigError: They would have to be learned, or their grid cannot be told.
    """
    codes = weights.position_table(cfg.encoder.width, cfg.grid, cfg.grid)
    trained = {cfg.grid, _told_grid(meta, "trained_grid") or cfg.grid}
    coded = _sine_cosine_grids(table, dtype, trained)
    here, count = say(cfg.grid), table.shape[1] - 1
    if coded and cfg.init.grid not in (None, coded[0]):
        raise ConfigError(
            f"config.init.torch_weights={cfg.init.torch_weights} has the fixed codes "
            f"of {say(coded[0])} patches, not of {say(cfg.init.grid)}; leave out "
            "--config.init.grid, which is for learned positions"
        )
    if not cfg.encoder.learned_positions:
        if coded is None:
            raise ConfigError(
                f"config.init.torch_weights={cfg.init.torch_weights} has a position "
                f"table of {count} patches that is not the fixed sine-cosine one; "
                "--config.encoder.learned_positions=true loads, resamples and trains it"
            )
        used = say(cfg.pos_embed_grid)
        if cfg.pos_embed_grid != cfg.grid:
            used += f", read at {here},"
        is_same = coded == (cfg.grid, cfg.pos_embed_grid)
        return (
            codes,
            f"Its positions are the fixed codes of {say(coded[0])} patches, "
            + ("as here." if is_same else f"here those of {used} are used."),
        )
    grid = coded[0] if coded else _learned_grid(count, meta, cfg)
    is_told = coded or _told_grid(meta, "grid")
    guess = "" if is_told else f"GUESS: its {count} positions are of {say(grid)}. "
    if grid == cfg.grid:
        return table, f"{guess}Its {here} positions are loaded."
    if coded:
        return (
            codes,
            f"Its positions are fixed codes; here they start from those of {here}.",
        )
    return resample_positions(table, grid, cfg.grid), (
        f"{guess}Its {say(grid)} positions were resampled to {here}."
    )


def find_grid(
    table: Float32[np.ndarray, "1 t d"],
    dtype: str,
    meta: Mapping[str, Any],
    cfg: ModelConfig,
) -> tuple[Grid, bool]:
    """Returns the grid that a table was trained on, and whether it was learned.

    Raises:
      ConfigError: It cannot be told.
    """
    trained = _told_grid(meta, "trained_grid")
    coded = _sine_cosine_grids(table, dtype, {trained} if trained else set())
    if coded:
        return coded[1], False
    return _learned_grid(table.shape[1] - 1, meta, cfg), True


def _sine_cosine_grids(
    table: Float32[np.ndarray, "1 t d"], dtype: str, trained: set[Grid]
) -> tuple[Grid, Grid] | None:
    """The grid whose codes `table` holds, and the one in whose coordinates."""
    count, width = table.shape[1] - 1, table.shape[2]
    if count > MAX_PATCHES:
        return None
    for rows in range(1, count + 1):
        if count % rows:
            continue
        grid = (rows, count // rows)
        for coordinates in {grid} | trained:
            codes = weights.position_table(width, coordinates, grid)
            if np.abs(table - codes).max() <= _TOLERANCE[dtype]:
                return grid, coordinates
    return None


def _learned_grid(count: int, meta: Mapping[str, Any], cfg: ModelConfig) -> Grid:
    """The grid of a learned table, as it is told, or by its number of patches."""
    told, grids = _told_grid(meta, "grid"), set()
    for rows, columns in _RATIOS:
        scale = math.isqrt(count // (rows * columns))
        if rows * columns * scale**2 == count:
            grids.add((rows * scale, columns * scale))
    if told:
        grids = {told} if math.prod(told) == count else set()
    elif cfg.num_patches == count:  # the size that is asked for decides
        grids = {cfg.grid}
    if len(grids) == 1:
        return grids.pop()
    could = " or ".join(map(say, sorted(grids))) or "neither 1:1 nor 2:1, 3:1 or 4:3"
    could = f"not {say(told)}" if told else could
    raise ConfigError(
        f"config.init.torch_weights={cfg.init.torch_weights} has learned positions of "
        f"{count} patches, whose rows and columns cannot be told ({could}); give them: "
        "--config.init.grid=ROWS,COLUMNS"
    )


def resample_positions(
    table: Float32[np.ndarray, "1 t d"], grid: Grid, new: Grid
) -> Float32[np.ndarray, "1 u d"]:
    """Returns a learned table on another grid over the same image; cls keeps its row.

    Bilinear between patch centres, constant beyond the outermost.

    Source: TransReID, vit_pytorch.py, `resize_pos_embed` (MAE and HAP take bicubic).
    """
    if new == grid:
        return table
    from scipy import ndimage  # 0.2 s, so only when used

    patches = table[0, 1:].astype(np.float64).reshape(*grid, -1)
    zoom = (new[0] / grid[0], new[1] / grid[1], 1)
    patches = np.asarray(
        ndimage.zoom(patches, zoom, order=1, mode="nearest", grid_mode=True), np.float32
    )
    return np.concatenate(
        [table[:, :1], patches.reshape(1, -1, table.shape[2])], axis=1
    )


def _told_grid(meta: Mapping[str, Any], name: str) -> Grid | None:
    match meta.get(name):
        case [int(rows), int(columns)] if 0 < rows < 1000 and 0 < columns < 1000:
            return rows, columns
    return None


def say(grid: Sequence[int]) -> str:
    """Rows and columns, or height and width, as a person reads them."""
    return f"{grid[0]} x {grid[1]}"
