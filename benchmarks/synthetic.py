"""Images/s of the data pipeline on one core, with the quickstart's pedestrians.

An image is rendered, encoded, decoded, cut into two regions and masked; batches are
whole and come from one thread. Nothing is compiled and no device is used.

Run: python benchmarks/synthetic.py
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from configs import quickstart
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import open_records

_REPEATS = 9
_IMAGES = 640  # in one repeat, about


def seconds(work: Callable[[int], object], arguments: range) -> float:
    """Returns the mean time of a call, over all arguments."""
    start = time.perf_counter()
    for argument in arguments:
        work(argument)
    return (time.perf_counter() - start) / len(arguments)


def main() -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cfg = quickstart.get_config()
    cfg.data.num_threads = 1
    records = open_records(cfg.data)
    batches = PretrainBatches(records, cfg)
    batch_size = cfg.train.batch_size
    num_steps = _IMAGES // batch_size
    whole, rendered = [], []  # seconds an image
    for repeat in range(_REPEATS + 1):
        steps = range(repeat * num_steps, (repeat + 1) * num_steps)
        whole.append(seconds(batches.__getitem__, steps) / batch_size)
        rendered.append(seconds(records.read, range(repeat, len(records), 37)))
    whole, rendered = whole[1:], rendered[1:]  # the first fills the caches
    print(f"rendered, encoded  {1e6 * statistics.median(rendered):6.0f} us an image")
    print(f"in a batch         {1e6 * statistics.median(whole):6.0f} us an image")
    print(
        f"images/s on one core: {1 / statistics.median(whole):.0f} (median of "
        f"{_REPEATS}; {1 / max(whole):.0f} to {1 / min(whole):.0f})"
    )


if __name__ == "__main__":
    main()
