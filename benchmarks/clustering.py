"""Seconds and peak memory of one clustering: sparse Jaccard distances and DBSCAN.

Features of loose clusters of 17 images, as Market-1501 has of a person, and as many as
Market-1501 and MSMT17 have to train on; each size in a process of its own.

Run: python benchmarks/clustering.py [--images 12936 32621]
"""

import argparse
import multiprocessing
import pathlib
import resource
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

_WIDTH, _EACH, _SPREAD = 384, 17, 1.0  # of a feature; images a person; their spread


def draw(images: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((-(-images // _EACH), _WIDTH), np.float32)
    noise = rng.standard_normal((images, _WIDTH), np.float32)
    return centres[rng.permutation(images) // _EACH] + _SPREAD * noise


def measure(images: int) -> tuple[float, float, float, int]:
    """Seconds; peak MiB in all, and beyond imports and features; clusters."""
    from personmae_jax.config_unsupervised import ClusterConfig
    from personmae_jax.unsupervised.clustering import cluster

    cluster(draw(340), ClusterConfig())  # imports
    features = draw(images)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    found = cluster(features, ClusterConfig())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak / 1024, (peak - before) / 1024, found.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[12936, 32621])
    print("| images | seconds | peak MiB | of it clustering's | clusters |")
    print("| --- | --- | --- | --- | --- |")
    for images in parser.parse_args().images:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak, grown, count = pool.apply(measure, (images,))
        print(
            f"| {images:,} | {seconds:.1f} | {peak:,.0f} | {grown:,.0f} | {count:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
