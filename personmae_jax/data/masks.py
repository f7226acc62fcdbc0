"""Which patches of RegionA the encoder sees: exactly as many in every image."""

import itertools
import math

import numpy as np
from jaxtyping import Bool, Float64, Int32, UInt8

from personmae_jax.config import MasksConfig
from personmae_jax.data.rng import BatchRng, Stream

_NUM_DRAWS = 8  # blocks drawn at once; 3 of 4 masks need no more


def sample_visible(
    rng: BatchRng, rows: int, columns: int, cfg: MasksConfig
) -> Int32[np.ndarray, "b v"]:
    """Ascending raster indices of the patches that stay visible.

    Args:
      rng: Randomness of b images.
      rows: Of patches.
      columns: Of patches.
      cfg: Kind of mask, ratio, and the shape of blocks.

    Returns:
      For each image exactly n - round(cfg.ratio * n) of its n patches.
    """
    num_patches = rows * columns
    num_hidden = round(cfg.ratio * num_patches)
    # The first num_hidden patches of this order are hidden: an exact count, always.
    order = rng.uniform(Stream.PATCHES, num_patches)
    if cfg.kind == "block":
        in_blocks = round(cfg.block_share * num_hidden)
        order = order + _sample_blocks(rng, rows, columns, in_blocks, cfg).T
        if in_blocks < num_hidden:
            beside = np.argsort(order, axis=1)[:, in_blocks:]
            numbers = rng.uniform(Stream.BESIDE_BLOCKS, num_patches)[:, in_blocks:]
            # Behind those of the blocks, whose values lie in 0..3.
            np.put_along_axis(order, beside, 3 + numbers, axis=1)
    visible = np.argsort(order, axis=1)[:, num_hidden:]
    return np.sort(visible.astype(np.int32), axis=1)


def _sample_blocks(
    rng: BatchRng, rows: int, columns: int, num_hidden: int, cfg: MasksConfig
) -> UInt8[np.ndarray, "n b"]:
    """Unites random blocks until they cover `num_hidden` patches.

    A block's area is uniform from `cfg.min_block` of all patches to half of what is
    to be hidden, its aspect log-uniform. Its place is uniform over all that touch
    the grid, and what overhangs is cut off: so one block covers every patch with the
    same probability, head and feet too.

    Returns:
      0 where the blocks before the last one lie, 1 in the rest of the last one, of
      which a random part is to be hidden, and 2 elsewhere.

    Source: BEiT (arXiv 2106.08254, algorithm 1), which keeps blocks inside, lets one
    grow to all that is left, and may miss the count. Half keeps the rate of every
    row within 0.03 of the ratio up to a ratio of 0.75; larger blocks do not.
    """
    # The images lie along the last axis: numpy is fast along a long one.
    union, without_last = np.zeros((2, rows * columns, len(rng)), bool)
    for call in itertools.count():
        numbers = rng.uniform(Stream.BLOCKS + call, _NUM_DRAWS * 4)
        for block in _blocks(numbers, rows, columns, num_hidden, cfg):
            is_open = union.sum(axis=0, dtype=np.int32) < num_hidden
            if not is_open.any():
                return np.uint8(2) - union - without_last
            without_last |= union & is_open
            union |= block & is_open
    raise AssertionError


def _blocks(
    numbers: Float64[np.ndarray, "b k4"],
    rows: int,
    columns: int,
    num_hidden: int,
    cfg: MasksConfig,
) -> Bool[np.ndarray, "k n b"]:
    """A block of every image from each four of its uniform numbers."""
    min_area = cfg.min_block * rows * columns
    max_area = max(min_area, num_hidden / 2)
    log_low, log_high = math.log(cfg.min_aspect), math.log(cfg.max_aspect)
    area, aspect, y, x = np.ascontiguousarray(
        numbers.reshape(len(numbers), -1, 4).transpose(2, 1, 0)
    )
    area = min_area + area * (max_area - min_area)
    aspect = np.exp(log_low + aspect * (log_high - log_low))
    height = np.maximum(1, np.round(np.sqrt(area * aspect)))
    width = np.ceil(area / height)  # rounded up: never below the area
    is_row = _spans(y, height, rows)
    is_column = _spans(x, width, columns)
    blocks = is_row[:, :, None] & is_column[:, None]
    return blocks.reshape(len(blocks), rows * columns, -1)


def _spans(
    place: Float64[np.ndarray, "k b"], length: Float64[np.ndarray, "k b"], size: int
) -> Bool[np.ndarray, "k {size} b"]:
    """Which of `size` lines a span of `length` covers that touches one at least."""
    start = np.floor(place * (size + length - 1)) - length + 1
    start, stop = start[:, None], (start + length)[:, None]
    line = np.arange(size, dtype=np.float64)[:, None]
    return (line >= start) & (line < stop)
