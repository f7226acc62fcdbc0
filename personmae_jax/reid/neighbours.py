"""k-reciprocal neighbours and their Jaccard distance, as sparse rows of images.

Re-ranking and clustering stand on these pieces. Two images are k-reciprocal neighbours
if each is among the other's k nearest. A list of neighbours begins with the nearest,
which is the image itself where no other is equal to it.

Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding
(CVPR 2017), equations 3 to 10.
"""

import itertools

import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int64

from personmae_jax.reid.retrieval import cosine_distances, of_unit_length

Features = Float32[np.ndarray, "_n d"]

_PAIRS = 2**14  # pairs of features compared at once: 96 MiB of ViT-B's


def k_nearest(
    images: Features, k: int, block: int
) -> tuple[Int64[np.ndarray, "_n _k"], Float32[np.ndarray, " _n"]]:
    """The k nearest images of each, nearest first, and its largest distance.

    `block` is that of `cosine_distances`.
    """
    k = min(k, len(images))
    nearest, furthest = [], []
    for rows in cosine_distances(images, images, block):
        furthest.append(rows.max(axis=1))
        for row in rows:
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


def expanded_reciprocal(
    whole: Int64[np.ndarray, "n _k"], half: Int64[np.ndarray, "n _h"]
) -> scipy.sparse.csr_array:
    """The reciprocal neighbours of each image, and those of theirs that fit in.

    A neighbour's own reciprocal neighbours in `half` join if more than two thirds of
    them are among the image's in `whole` (equation 5).

    Args:
      whole: The k nearest images of each.
      half: The first half as many of them, or so.

    Returns:
      n x n; what is stored in a row are its members, the values are above 0.
    """
    near, nearer = _reciprocal(whole), _reciprocal(half)
    shared = near.multiply(near @ nearer.T).tocsr()
    sizes = nearer.sum(axis=1)
    shared.data = (3 * shared.data > 2 * sizes[shared.indices]).astype(np.float32)
    return (near + shared @ nearer).tocsr()


def weighed(
    members: scipy.sparse.csr_array,
    images: Features,
    scale: Float32[np.ndarray, " n"],
) -> scipy.sparse.csr_array:
    """Weights exp(-(1 - cosine) / scale), each row's sum 1 (equation 7)."""
    units = of_unit_length(images)
    owner = np.repeat(np.arange(len(images)), np.diff(members.indptr))
    weights = np.empty(len(owner), np.float32)
    for start in range(0, len(owner), _PAIRS):
        part = slice(start, start + _PAIRS)
        i, j = owner[part], members.indices[part]
        distance = 1 - np.einsum("pd,pd->p", units[i], units[j])
        weights[part] = np.exp(-distance / scale[i])
    weights /= np.bincount(owner, weights)[owner]
    return scipy.sparse.csr_array(
        (weights, members.indices, members.indptr), shape=members.shape
    )


def averaged(
    rows: scipy.sparse.csr_array, nearest: Int64[np.ndarray, "n _k"]
) -> scipy.sparse.csr_array:
    """The mean row of each image's nearest ones; of one alone, its own (equation 9)."""
    if nearest.shape[1] <= 1:
        return rows
    total = _membership(nearest) @ rows
    return scipy.sparse.csr_array(total / np.float32(nearest.shape[1]))


def jaccard_distances(
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
