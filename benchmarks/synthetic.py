"""Images/s of drawn pedestrians on one core: drawn, encoded, decoded, cropped twice.

Run: python benchmarks/synthetic.py
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

sys.path.insert(0, str(Path(__file__).parents[1]))
from personmae_jax.data import synthetic

_IDENTITIES, _CAMERAS, _SHOTS = 2000, 6, 4
_IMAGES = 600  # in one repeat; no image is drawn twice in a run
_REPEATS = 9


def crop_twice(file: bytes, index: int) -> list[np.ndarray]:
    """Returns two random regions, 50 to 100 % of the area each, as 128 x 64 pixels."""
    image = simplejpeg.decode_jpeg(file)
    height, width = image.shape[:2]
    regions = []
    for area, shape, down, across in np.random.default_rng(index).random((2, 4)):
        area, shape = 0.5 + 0.5 * area, (4 / 3) ** (2 * shape - 1)
        rows = min(height, round(height * (area / shape) ** 0.5))
        columns = min(width, round(width * (area * shape) ** 0.5))
        y, x = round(down * (height - rows)), round(across * (width - columns))
        region = image[y : y + rows, x : x + columns]
        regions.append(cv2.resize(region, (64, 128), interpolation=cv2.INTER_CUBIC))
    return regions


def seconds(work: Callable, items: list[tuple]) -> tuple[float, list]:
    start = time.perf_counter()
    results = [work(*item) for item in items]
    return (time.perf_counter() - start) / len(items), results


def main() -> None:
    cv2.setNumThreads(0)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    count = _IDENTITIES * _CAMERAS * _SHOTS
    order = np.random.default_rng(0).permutation(count)[: _IMAGES * (_REPEATS + 1)]
    shape = (_IDENTITIES, _CAMERAS, _SHOTS)
    records = [tuple(map(int, np.unravel_index(index, shape))) for index in order]
    encode = functools.partial(
        simplejpeg.encode_jpeg, quality=90, colorsubsampling="420"
    )
    times = {"draw": [], "encode": [], "decode and crop twice": []}
    for repeat in range(_REPEATS + 1):
        part = records[repeat * _IMAGES : (repeat + 1) * _IMAGES]
        draw, images = seconds(synthetic.draw_pedestrian, [(0, *r) for r in part])
        write, files = seconds(encode, [(image,) for image in images])
        read, _ = seconds(crop_twice, [(file, n) for n, file in enumerate(files)])
        if repeat:  # the first one fills the caches of places and occluders
            for spent, value in zip(times.values(), (draw, write, read), strict=True):
                spent.append(value)
    for name, spent in times.items():
        print(f"{name:24s}{1e6 * statistics.median(spent):7.0f} us an image")
    rates = [1 / sum(parts) for parts in zip(*times.values(), strict=True)]
    print(
        f"images/s on one core: {statistics.median(rates):.0f} (median of {_REPEATS}"
        f" x {_IMAGES}; {min(rates):.0f} to {max(rates):.0f})"
    )


if __name__ == "__main__":
    main()
