"""k-reciprocal re-ranking with sparse matrices: no full matrix in memory.

Two images are k-reciprocal neighbours if each is among the other's k nearest. Each
image is described by a sparse row: its k1-reciprocal neighbours, enlarged by theirs,
weighed by nearness and averaged over its k2 nearest images. The new distance mixes
the Jaccard distance of these rows with the old one.

Source: Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding
(CVPR 2017), equations 3 to 12, with the defaults and the scaling by each image's
largest distance of the authors' code (zhunzhong07/person-re-ranking).
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse
from jaxtyping import Float32

from personmae_jax.reid import neighbours
from personmae_jax.reid.neighbours import Features
from personmae_jax.reid.retrieval import BLOCK, cosine_distances


def rerank(
    query: Features,
    gallery: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    old_weight: float = 0.3,
    block: int = BLOCK,
) -> Iterator[Float32[np.ndarray, "_b g"]]:
    """Yields re-ranked distances in blocks of queries, in order.

    At equal distance the image that comes first is the nearer neighbour, queries
    before the gallery. The neighbours take (q + g)**2 distances, one block at a time.

    Args:
      query: Of any length but 0, as of the gallery.
      gallery: The same.
      k1: Neighbours beside the image itself, cut to those that there are.
      k2: Images to average over, the image itself among them; 1: no average.
      old_weight: Of the old distance in the mixture, 0 to 1.
      block: Distances held at once.
    """
    images = np.concatenate([query, gallery])
    nearest, furthest = neighbours.k_nearest(images, max(k1 + 1, k2), block)
    half = round(k1 / 2) + 1
    members = neighbours.expanded_reciprocal(nearest[:, : k1 + 1], nearest[:, :half])
    rows = neighbours.weighed(members, images, furthest)
    rows = neighbours.averaged(rows, nearest[:, :k2])
    of_query = scipy.sparse.csr_array(rows[: len(query)])
    by_member = scipy.sparse.csc_array(rows[len(query) :])
    start = 0
    for found in cosine_distances(query, gallery, block):
        stop = start + len(found)
        old = found / furthest[start:stop, None]
        own = of_query[start:stop]
        new = neighbours.jaccard_distances(own, by_member, len(gallery))
        yield old_weight * old + (1 - old_weight) * new
        start = stop
