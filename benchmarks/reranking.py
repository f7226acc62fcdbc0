"""Re-ranking in blocks with sparse rows against full matrices: memory and time.

Both re-rank the same drawn features, each in a process of its own, whose peak memory
and seconds are printed; the distances that they make are compared. "plain" is the
algorithm as its authors' numpy code has it (zhunzhong07/person-re-ranking): every
pair of images in dense float32 matrices, written here anew.

Run: python benchmarks/reranking.py [--images 2000 6000]
"""

import argparse
import multiprocessing
import pathlib
import resource
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

_WIDTH, _EACH, _SPREAD = 384, 12, 1.5  # of a feature; images a person; their spread
_BLOCK = 2**22  # distances that ours holds at a time: 16 MiB
_K1, _K2, _OLD = 20, 6, 0.3
_WAYS = ("plain", "ours")


def draw(images: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of people in loose clusters: one query to five gallery images."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((-(-images // _EACH), _WIDTH), np.float32)
    noise = rng.standard_normal((images, _WIDTH), np.float32)
    features = centres[rng.permutation(images) // _EACH] + _SPREAD * noise
    return features[: images // 6], features[images // 6 :]


def plain(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Re-ranked distances by full matrices over all pairs of images."""
    images = np.concatenate([query, gallery])
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    old = 1 - images @ images.T
    old /= old.max(axis=1, keepdims=True)
    order = np.argsort(old, axis=1, kind="stable").astype(np.int32)
    rows = np.zeros_like(old)
    for i in range(len(images)):
        own = members = _reciprocal(order, i, _K1)
        for j in own:
            near = _reciprocal(order, j, round(_K1 / 2))
            if 3 * len(np.intersect1d(near, own)) > 2 * len(near):
                members = np.append(members, near)
        members = np.unique(members)
        weights = np.exp(-old[i, members])
        rows[i, members] = weights / weights.sum()
    rows = np.stack([rows[order[i, :_K2]].mean(axis=0) for i in range(len(images))])
    split = len(query)
    owners = [np.flatnonzero(rows[:, j]) for j in range(len(images))]
    jaccard = np.zeros((split, len(images)), np.float32)
    for i in range(split):
        shared = np.zeros(len(images), np.float32)
        for j in np.flatnonzero(rows[i]):
            shared[owners[j]] += np.minimum(rows[i, j], rows[owners[j], j])
        jaccard[i] = 1 - shared / (2 - shared)
    return (1 - _OLD) * jaccard[:, split:] + _OLD * old[:split, split:]


def _reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    near = order[i, : k + 1]
    return near[(order[near, : k + 1] == i).any(axis=1)]


def ours(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The package's, in blocks and with sparse rows."""
    from personmae_jax.reid.reranking import rerank

    options = {"k1": _K1, "k2": _K2, "old_weight": _OLD, "block": _BLOCK}
    return np.concatenate([*rerank(query, gallery, **options)])


def measure(way: str, images: int, folder: str) -> tuple[float, float]:
    """Seconds, and by how many MiB the peak memory grew; the distances go to a file."""
    query, gallery = draw(images)
    globals()[way](*draw(48))  # imports and compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    distances = globals()[way](query, gallery)
    seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    np.save(f"{folder}/{way}.npy", distances)
    return seconds, grown / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 6000])
    print("| images | way | seconds | MiB | largest difference |")
    print("| --- | --- | --- | --- | --- |")
    for images in parser.parse_args().images:
        with tempfile.TemporaryDirectory() as folder:
            for way in _WAYS:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, grown = pool.apply(measure, (way, images, folder))
                whole, own = (np.load(f"{folder}/{w}.npy") for w in (_WAYS[0], way))
                difference = float(np.abs(whole - own).max())
                assert difference < 1e-3, (way, difference)
                print(
                    f"| {images:,} | {way} | {seconds:.1f} | {grown:,.0f} | "
                    f"{difference:.0e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
