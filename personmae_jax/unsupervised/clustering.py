"""Pseudo labels: DBSCAN on the k-reciprocal Jaccard distance, without a full matrix.

Distances above eps are never needed, so only those up to `MAX_EPS` are kept, a dozen a
row where people differ. DBSCAN on that graph gives the labels that it gives on the full
matrix. No identity is read here, and nothing is random.

Sources: the clustering of damo-cv/TransReID-SSL, cluster-contrast-reid: usl.py and
utils/faiss_rerank.py, which CION and PASS share; its k1 counts the image itself. Ester
et al., A Density-Based Algorithm (KDD 1996). Per-camera proxies: Wang et al., Camera-
aware Proxies (arXiv 2012.10674).
"""

import dataclasses

import numpy as np
import scipy.sparse
from jaxtyping import Float32, Int, Int32, Int64

from personmae_jax.config_unsupervised import ClusterConfig
from personmae_jax.errors import RunError
from personmae_jax.reid import neighbours

OUTLIER = -1  # label of an image that belongs to no cluster
EPS = (0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7)  # tried for eps=None; ours
MAX_EPS = 0.8  # distances above are not kept

# Rows of Jaccard distances made at once. Another size of blocks changes 1 in 100,000
# neighbours by rounding, so these are part of what a label is, and no settings.
_ROWS = 256
_BLOCK = 2**22  # cosine distances: 16 MiB


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Clusters:
    """One clustering of n images."""

    labels: Int32[np.ndarray, " n"]  # from 0, by the first core image; or OUTLIER
    eps: float  # the largest distance of neighbours that was used

    @property
    def count(self) -> int:
        return int(self.labels.max(initial=OUTLIER)) + 1

    @property
    def sizes(self) -> Int64[np.ndarray, " _c"]:
        """Images of every cluster."""
        return np.bincount(self.labels[self.labels != OUTLIER], minlength=self.count)

    @property
    def outliers(self) -> int:
        """Images that belong to no cluster."""
        return int(np.count_nonzero(self.labels == OUTLIER))


def cluster(
    features: Float32[np.ndarray, "n _d"],
    cfg: ClusterConfig,
    cameras: Int[np.ndarray, " n"] | None = None,
) -> Clusters:
    """Groups images that are likely of one person, by a feature of each.

    Without `cfg.eps`, at most MAX_EPS, it is that of EPS which makes the most clusters,
    the smallest of equals. With `cameras`, some cluster has to have images of two, if
    there are two.

    Raises:
      RunError: A collapse, with the number of clusters at each eps: fewer than two
        clusters, nine tenths of the images in one, or each of one camera; or a feature
        is zero or not finite.
    """
    graph, eps = jaccard_graph(features, cfg.k1, cfg.k2), cfg.eps
    if eps is None:
        by_eps = clusters_by_eps(graph, cfg.min_samples)
        eps = max(by_eps, key=lambda pair: pair[1])[0]  # the first of equals
    found = Clusters(labels=dbscan(graph, eps, cfg.min_samples), eps=eps)
    if what := _collapse(found, cameras, cfg):
        by_eps = clusters_by_eps(graph, cfg.min_samples)
        table = ", ".join(f"{e} {count}" for e, count in by_eps)
        raise RunError(f"{what}; clusters by eps: {table}; start in another --workdir")
    return found


def jaccard_graph(
    features: Float32[np.ndarray, "_n _d"], k1: int, k2: int
) -> scipy.sparse.csr_array:
    """Jaccard distances up to MAX_EPS, symmetric to the bit; 0 is stored as such.

    An image is described by its k1-reciprocal neighbours, weighed by exp(-(squared
    Euclidean distance of unit features)) and averaged over its k2 nearest.
    """
    n = len(features)
    nearest, _ = neighbours.k_nearest(features, max(k1, k2), _BLOCK)
    half = round(k1 / 2) + 1  # as in the authors' code, where k1 counts the image
    members = neighbours.expanded_reciprocal(nearest[:, :k1], nearest[:, :half])
    # exp(-(1 - cosine) / 0.5) = exp(-(2 - 2 cosine))
    rows = neighbours.weighed(members, features, np.full(n, 0.5, np.float32))
    rows = neighbours.averaged(rows, nearest[:, :k2]).tocsr()
    # Sums in one order: else the distance of (i, j) and of (j, i) differ in a bit.
    rows.sort_indices()
    by_member = scipy.sparse.csc_array(rows)
    columns, values, counts = [], [], []
    for start in range(0, n, _ROWS):
        block = neighbours.jaccard_distances(rows[start : start + _ROWS], by_member, n)
        block = np.maximum(block, 0)  # rounding gives -1e-7
        own, near = np.nonzero(block <= np.float32(MAX_EPS))
        columns.append(near)
        values.append(block[own, near])
        counts.append(np.bincount(own, minlength=len(block)))
    ends = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return scipy.sparse.csr_array(
        (np.concatenate(values), np.concatenate(columns), ends), shape=(n, n)
    )


def dbscan(
    graph: scipy.sparse.csr_array, eps: float, min_samples: int
) -> Int32[np.ndarray, " n"]:
    """Labels of DBSCAN; a missing entry of the graph is farther than any eps.

    An image at the border of two clusters goes to that with the lower number.
    """
    from sklearn.cluster import DBSCAN  # takes half a second to import

    is_near = graph.data <= np.float32(eps)
    # Built anew, because scipy's own comparison drops the zeros of equal images.
    ends = np.concatenate([[0], np.cumsum(is_near)])[graph.indptr]
    near = scipy.sparse.csr_array(
        (graph.data[is_near], graph.indices[is_near], ends), shape=graph.shape
    )
    fit = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit(near)
    return fit.labels_.astype(np.int32)


def clusters_by_eps(
    graph: scipy.sparse.csr_array, min_samples: int
) -> tuple[tuple[float, int], ...]:
    """(eps, number of clusters) for all of EPS."""
    return tuple((e, int(dbscan(graph, e, min_samples).max()) + 1) for e in EPS)


def doubts(
    clusters: Clusters, cameras: Int[np.ndarray, " n"], a_step: int
) -> dict[str, str]:
    """A sentence, by a word for it, for all that makes pseudo labels doubtful.

    Args:
      clusters: Two or more.
      cameras: That saw the images; all the same where not known.
      a_step: Clusters of which a step takes images.
    """
    n, largest = len(clusters.labels), int(clusters.sizes.max())
    found = {}
    if largest > 0.2 * n:
        found["largest"] = (
            f"One cluster holds {largest:,} of {n:,} images: eps={clusters.eps} is too "
            "large, or the encoder tells nobody apart; try eps=None, or k1 near the "
            "number of images a person."
        )
    if clusters.outliers > 0.8 * n:
        found["outliers"] = (
            f"{clusters.outliers:,} of {n:,} images are in no cluster: "
            f"eps={clusters.eps} is too small, or the encoder tells people apart "
            "poorly; try eps=None."
        )
    if clusters.count < a_step:
        found["few"] = (
            f"There are {clusters.count:,} clusters, and a step takes {a_step:,}: it "
            "takes each more than once."
        )
    across = num_across_cameras(clusters, cameras)
    if len(np.unique(cameras)) > 1 and across < 0.1 * clusters.count:
        found["cameras"] = (
            f"Only {across:,} of {clusters.count:,} clusters have images of two or "
            "more cameras: they follow cameras rather than people; train with "
            "--config.cluster.centre_cameras=True, or with "
            "--config.memory.camera_proxies=True."
        )
    return found


def num_across_cameras(clusters: Clusters, cameras: Int[np.ndarray, " n"]) -> int:
    """How many clusters have images of two or more cameras."""
    _, parents = camera_proxies(clusters.labels, cameras)
    return int(np.count_nonzero(np.bincount(parents, minlength=1) > 1))


def agreement(before: Int32[np.ndarray, " n"], after: Int32[np.ndarray, " n"]) -> float:
    """Adjusted Rand index of two clusterings, over images that are in both."""
    from sklearn.metrics import adjusted_rand_score

    is_in_both = (before != OUTLIER) & (after != OUTLIER)
    if not is_in_both.any():
        return 0.0
    return float(adjusted_rand_score(before[is_in_both], after[is_in_both]))


def camera_proxies(
    labels: Int32[np.ndarray, " n"],
    cameras: Int[np.ndarray, " n"],
) -> tuple[Int32[np.ndarray, " n"], Int32[np.ndarray, " _p"]]:
    """Splits every cluster into its images of one camera each.

    Returns:
      The proxy of every image, numbered by cluster, then by camera, or OUTLIER; and
      the cluster of every proxy.
    """
    is_clustered = labels != OUTLIER
    proxies = np.full(len(labels), OUTLIER, np.int32)
    pairs = np.stack([labels[is_clustered], cameras[is_clustered]], axis=1)
    found, numbers = np.unique(pairs, axis=0, return_inverse=True)
    proxies[is_clustered] = numbers
    return proxies, found[:, 0].astype(np.int32)


def _collapse(
    clusters: Clusters, cameras: Int[np.ndarray, " n"] | None, cfg: ClusterConfig
) -> str:
    """What is wrong and its way out, or nothing.

    A collapse looks like success in the loss: everybody is the same cluster.
    """
    n, eps = len(clusters.labels), clusters.eps
    most = "" if cfg.eps is None else ", that of the most clusters (eps=None)"
    if not clusters.count:
        return (
            f"none of {n:,} images has enough others within eps={eps} to make a "
            f"cluster: it needs a larger one{most}, or the encoder tells people apart "
            "poorly"
        )
    largest = int(clusters.sizes.max())
    if clusters.count == 1 or largest > 0.9 * n:
        return (
            f"{largest:,} of {n:,} images are in one cluster at eps={eps}: it needs a "
            f"smaller one{most}, or k1 near the number of images a person, or the "
            "encoder tells nobody apart"
        )
    if cameras is None or len(np.unique(cameras)) == 1:
        return ""
    if num_across_cameras(clusters, cameras):
        return ""
    return (
        f"each of {clusters.count:,} clusters has images of one camera alone: they "
        "follow cameras rather than people; it needs "
        "--config.cluster.centre_cameras=True, or, also where no two cameras see the "
        "same people, --config.memory.camera_proxies=True"
    )
