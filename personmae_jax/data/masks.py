"""Which patches of RegionA the encoder sees: exactly as many in every image.

A set of patches is one Python integer here, bit `row * columns + column` for each:
a block is set, united and counted in a microsecond, which keeps the mask's share of
an image's time under a tenth.
"""

import math

import numpy as np
from jaxtyping import Bool, Int32

from personmae_jax.config import MasksConfig

_NUM_DRAWS = 8  # blocks whose random numbers are drawn in one call


def sample_visible(
    rng: np.random.Generator, rows: int, columns: int, cfg: MasksConfig
) -> Int32[np.ndarray, " v"]:
    """Ascending raster indices of the patches that stay visible.

    Args:
      rng: Source of randomness.
      rows: Of patches.
      columns: Of patches.
      cfg: Kind of mask, ratio, and the shape of blocks.

    Returns:
      Exactly n - round(cfg.ratio * n) of the n patches.
    """
    num_patches = rows * columns
    num_hidden = round(cfg.ratio * num_patches)
    if cfg.kind == "random":
        visible = rng.permutation(num_patches)[num_hidden:]
        visible.sort()
    else:
        is_hidden = _hide_blocks(rng, rows, columns, num_hidden, cfg)
        visible = (~is_hidden).nonzero()[0]
    return visible.astype(np.int32)


def _hide_blocks(
    rng: np.random.Generator,
    rows: int,
    columns: int,
    num_hidden: int,
    cfg: MasksConfig,
) -> Bool[np.ndarray, " n"]:
    """Unites random blocks until `num_hidden` patches are covered.

    A block's area is uniform from `cfg.min_block` of all patches to half of what is
    to be hidden, its aspect log-uniform. Its place is uniform over all that touch
    the grid, and what overhangs is cut off: so one block covers every patch with the
    same probability, head and feet too. Of the last block a random part is taken,
    such that the count is exact.

    Source: BEiT (arXiv 2106.08254, algorithm 1), which keeps blocks inside, lets one
    grow to all that is left, and may miss the count. Half keeps the rate of every
    row within 0.03 of the ratio up to a ratio of 0.75; larger blocks do not.
    """
    num_patches = rows * columns
    min_area = cfg.min_block * num_patches
    max_area = max(min_area, num_hidden / 2)
    log_low, log_high = math.log(cfg.min_aspect), math.log(cfg.max_aspect)
    hidden, missing = 0, num_hidden
    while missing:
        for area, aspect, y, x in rng.random((_NUM_DRAWS, 4)).tolist():
            area = min_area + area * (max_area - min_area)
            aspect = math.exp(log_low + aspect * (log_high - log_low))
            height = max(1, round(math.sqrt(area * aspect)))
            width = math.ceil(area / height)  # rounded up: never below the area
            top = int(y * (rows + height - 1)) - height + 1
            left = int(x * (columns + width - 1)) - width + 1
            block = _block(top, left, height, width, rows, columns) & ~hidden
            num_new = block.bit_count()
            if num_new >= missing:
                is_hidden = _unpack(hidden, num_patches)
                candidates = _unpack(block, num_patches).nonzero()[0]
                is_hidden[rng.permutation(candidates)[:missing]] = True
                return is_hidden
            hidden |= block
            missing -= num_new
    return np.zeros(num_patches, bool)


def _block(
    top: int, left: int, height: int, width: int, rows: int, columns: int
) -> int:
    """The part inside the grid of a rectangle, as a set of patches."""
    bottom, right = min(top + height, rows), min(left + width, columns)
    top, left = max(top, 0), max(left, 0)
    row = ((1 << (right - left)) - 1) << left
    # A one at the start of every row of the block: times `row`, the whole block.
    starts = ((1 << columns * (bottom - top)) - 1) // ((1 << columns) - 1)
    return row * starts << columns * top


def _unpack(patches: int, num_patches: int) -> Bool[np.ndarray, " n"]:
    packed = np.frombuffer(patches.to_bytes((num_patches + 7) // 8, "little"), np.uint8)
    return np.unpackbits(packed, count=num_patches, bitorder="little").view(bool)
