"""k-reciprocal re-ranking with sparse matrices: no full matrix in memory.

Two images are k-reciprocal neighbours if each is among the other's k nearest. Each
image is described by a sparse row: its k1-reciprocal neighbours, enlarged by theirs,
weighed by nearness and averaged over its k2 nearest images. The new distance mixes
the Jaccard distance of these rows with the old one.

Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding
(CVPR 2017), equations 3 to 12, with the defaults and the scaling by each image's
largest distance of the authors' code (zhunzhong07/person-re-ranking).
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int64

from personmae_jax.reid.retrieval import cosine_distances, lengths

Features = Float32[np.ndarray, "_n d"]
Distances = Callable[[Features, Features], Iterator[Float32[np.ndarray, "_b _g"]]]

_PAIRS = 2**14  # pairs of features compared at once: 96 MiB of ViT-B's


def rerank(
    query: Features,
    gallery: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    old_weight: float = 0.3,
    distances: Distances = cosine_distances,
) -> Iterator[Float32[np.ndarray, "_b g"]]:
    """Yields re-ranked distances in blocks of queries, in order.

    At equal distance the image that comes first is the nearer neighbour, queries
    before the gallery. The neighbours take (q + g)**2 distances, one block at a time.

    Args:
      query: Features of the queries.
      gallery: Features of the gallery.
      k1: Neighbours beside the image itself, cut to those that there are.
      k2: Images to average over, the image itself among them; 1: no average.
      old_weight: Of the old distance in the mixture, 0 to 1.
      distances: (rows, columns) -> 1 - cosine in blocks of rows.
    """
    images = np.concatenate([query, gallery])
    neighbours, furthest = _neighbours(images, max(k1 + 1, k2), distances)
    expanded = _expanded_reciprocal(neighbours, k1)
    rows = _weighed(expanded, images, furthest)
    if k2 > 1:
        nearest = neighbours[:, :k2]
        rows = _membership(nearest) @ rows / np.float32(nearest.shape[1])
    of_query = scipy.sparse.csr_array(rows[: len(query)])
    by_member = scipy.sparse.csc_array(rows[len(query) :])
    start = 0
    for block in distances(query, gallery):
        stop = start + len(block)
        old = block / furthest[start:stop, None]
        new = _jaccard_distances(of_query[start:stop], by_member, len(gallery))
        yield old_weight * old + (1 - old_weight) * new
        start = stop


def _neighbours(
    images: Features, k: int, distances: Distances
) -> tuple[Int64[np.ndarray, "_n _k"], Float32[np.ndarray, " _n"]]:
    """The k nearest images of each, nearest first, and its largest distance."""
    k = min(k, len(images))
    nearest, furthest = [], []
    for block in distances(images, images):
        furthest.append(block.max(axis=1))
        for row in block:
            near = np.flatnonzero(row <= np.partition(row, k - 1)[k - 1])
            nearest.append(near[np.argsort(row[near], kind="stable")[:k]])
    return np.stack(nearest), np.concatenate(furthest)


def _membership(neighbours: Int64[np.ndarray, "n k"]) -> scipy.sparse.csr_array:
    """Row i holds 1 in the columns of i's neighbours."""
    n, k = neighbours.shape
    ends = np.arange(0, n * k + 1, k)
    ones = np.ones(n * k, np.float32)
    return scipy.sparse.csr_array((ones, neighbours.ravel(), ends), shape=(n, n))


def _reciprocal(neighbours: Int64[np.ndarray, "n k"]) -> scipy.sparse.csr_array:
    forward = _membership(neighbours)
    return forward.multiply(forward.T.tocsr()).tocsr()


def _expanded_reciprocal(
    neighbours: Int64[np.ndarray, "n k"], k1: int
) -> scipy.sparse.csr_array:
    """The k1-reciprocal neighbours, and the half as many of those that fit in.

    A neighbour's own k1 / 2 reciprocal neighbours join if more than two thirds of
    them are among the image's k1 (equation 5).
    """
    whole = _reciprocal(neighbours[:, : k1 + 1])
    half = _reciprocal(neighbours[:, : round(k1 / 2) + 1])
    shared = whole.multiply(whole @ half.T).tocsr()
    sizes = half.sum(axis=1)
    shared.data = (3 * shared.data > 2 * sizes[shared.indices]).astype(np.float32)
    return (whole + shared @ half).tocsr()


def _weighed(
    members: scipy.sparse.csr_array,
    images: Features,
    furthest: Float32[np.ndarray, " n"],
) -> scipy.sparse.csr_array:
    """Weights exp(-distance / largest distance), each row's sum 1 (equation 7)."""
    units = images / lengths(images)[:, None]
    owner = np.repeat(np.arange(len(images)), np.diff(members.indptr))
    weights = np.empty(len(owner), np.float32)
    for start in range(0, len(owner), _PAIRS):
        part = slice(start, start + _PAIRS)
        i, j = owner[part], members.indices[part]
        distance = 1 - np.einsum("pd,pd->p", units[i], units[j])
        weights[part] = np.exp(-distance / furthest[i])
    weights /= np.bincount(owner, weights)[owner]
    return scipy.sparse.csr_array(
        (weights, members.indices, members.indptr), shape=members.shape
    )


def _jaccard_distances(
    queries: scipy.sparse.csr_array, by_member: scipy.sparse.csc_array, num_gallery: int
) -> Float32[np.ndarray, "b {num_gallery}"]:
    """1 - (sum of minima) / (sum of maxima) of rows that each sum to 1."""
    minima = []
    for start, stop in itertools.pairwise(queries.indptr):
        columns = by_member[:, queries.indices[start:stop]]
        own = np.repeat(queries.data[start:stop], np.diff(columns.indptr))
        least = np.minimum(columns.data, own)
        minima.append(np.bincount(columns.indices, least, num_gallery))
    shared = np.stack(minima).astype(np.float32)
    return 1 - shared / (2 - shared)
