"""Hides a part of a person, to ask how much a retrieval depends on seeing all."""

import numpy as np
from jaxtyping import UInt8

_SEED = 8  # so that every run and every network is asked the same


def occlude(pixels: UInt8[np.ndarray, "height width 3"], record: int) -> None:
    """Paints a block of one colour over an image, in place.

    It covers a quarter to half of the image, uniformly drawn; its height is
    log-uniform from that fraction of the image's to all of it, so it may hide the
    legs as a car does, or one side as a door does. It lies anywhere inside, half of
    the time against an edge in each direction; its colour is uniform. All is a
    function of `record`, its number, alone, up to rounding to pixels.

    Source: ours, after random erasing (arXiv 1708.04896), which hides 2 to 40 %.
    """
    rng = np.random.default_rng([_SEED, record])
    area, shape, *place = rng.uniform((0.25, 0, -0.5, -0.5), (0.5, 1, 1.5, 1.5))
    high = area**shape
    cut = []
    for part, where, size in zip(
        (high, area / high), place, pixels.shape, strict=False
    ):
        length = max(1, round(part * size))
        start = round(min(max(where, 0), 1) * (size - length))
        cut.append(slice(start, start + length))
    pixels[tuple(cut)] = rng.integers(0, 256, 3)
