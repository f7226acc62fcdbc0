"""Promises of clustering: the field's dense algorithm, sparse, and told in words."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_rand_score

from personmae_jax.config_unsupervised import ClusterConfig
from personmae_jax.errors import RunError
from personmae_jax.reid.retrieval import cosine_distances
from personmae_jax.unsupervised import clustering
from personmae_jax.unsupervised.clustering import (
    EPS,
    MAX_EPS,
    OUTLIER,
    Clusters,
    cluster,
    clusters_by_eps,
    dbscan,
    jaccard_graph,
)


def _people(seed, num_people=12, num_images=10, spread=0.6, width=16):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_people, width))
    features = np.repeat(centres, num_images, axis=0)
    features = features + spread * rng.standard_normal(features.shape)
    return rng.permutation(features).astype(np.float32)


def _disconnected(seed):
    """Two groups whose features share no dimension, and one image twice."""
    one, other = _people(seed, 5, 8, width=8), _people(seed + 1, 5, 8, width=8)
    features = np.zeros((80, 16), np.float32)
    features[:40, :8], features[40:, 8:] = one, other
    features[7] = features[3]
    return features


KINDS = {
    "noise": lambda: _people(0, 60, 1),
    "tight": lambda: _people(1),
    "loose": lambda: _people(2, spread=1.0),
    "twice": lambda: np.concatenate([_people(3), _people(3)[:30]]),
    "disconnected": lambda: _disconnected(4),
}


def _dense(features, k1, k2):
    """Jaccard distances by the formulas on full matrices, image by image, float64.

    As TransReID-SSL's utils/faiss_rerank.py defines them: k1 counts the image itself,
    the half does not, and squared distances of unit features are not scaled.
    """
    unit = features.astype(np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    squared = 2 - 2 * unit @ unit.T
    # Who is nearer is told in float32, which decides between equal images, too.
    (distances,) = cosine_distances(features, features)
    order = np.argsort(distances, axis=1, kind="stable")
    n = len(features)

    def reciprocal(i, columns):
        return {j for j in order[i, :columns] if i in order[j, :columns]}

    rows = np.zeros((n, n))
    for i in range(n):
        own = reciprocal(i, k1)
        members = set(own)
        for j in own:
            candidates = reciprocal(j, round(k1 / 2) + 1)
            if len(candidates & own) > 2 / 3 * len(candidates):
                members |= candidates
        members = sorted(members)
        weights = np.exp(-squared[i, members])
        rows[i, members] = weights / weights.sum()
    if k2 > 1:
        rows = np.stack([rows[order[i, :k2]].mean(axis=0) for i in range(n)])
    minima = np.minimum(rows[:, None], rows[None]).sum(axis=-1)
    return 1 - minima / (2 - minima)


def _graph(distances):
    """A graph of all distances up to MAX_EPS, zeros stored."""
    own, near = np.nonzero(distances <= MAX_EPS)
    ends = np.concatenate([[0], np.cumsum(np.bincount(own, minlength=len(distances)))])
    values = distances[own, near].astype(np.float32)
    return scipy.sparse.csr_array((values, near, ends), shape=distances.shape)


def test_jaccard_distances_equal_the_formulas():
    features = _people(5, 5, 8)
    graph, expected = jaccard_graph(features, 8, 3), _dense(features, 8, 3)
    stored = scipy.sparse.csr_array(
        (np.ones_like(graph.data), graph.indices, graph.indptr), shape=graph.shape
    ).toarray()
    is_far = expected > MAX_EPS
    np.testing.assert_array_equal(stored == 0, is_far)
    np.testing.assert_allclose(graph.toarray()[~is_far], expected[~is_far], atol=1e-6)


# Not 0.5: the distance of many pairs is exactly that, and rounding takes a side.
@pytest.mark.parametrize("eps", [0.3, 0.45, 0.55, 0.6, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_equal_dbscan_on_the_full_matrix_of_the_formulas(kind, eps):
    features = KINDS[kind]()
    full = np.maximum(_dense(features, 10, 3), 0)
    assert np.abs(full - eps).min() > 1e-5
    expected = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit(full).labels_
    graph = jaccard_graph(features, 10, 3)
    np.testing.assert_array_equal(dbscan(graph, eps, 4), expected)
    if expected.max() > 0:
        found = cluster(features, ClusterConfig(k1=10, k2=3, eps=eps))
        np.testing.assert_array_equal(found.labels, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_symmetric_to_the_bit_and_holds_its_zeros(kind):
    graph = jaccard_graph(KINDS[kind](), 10, 3)
    other = graph.T.tocsr()
    graph.sort_indices()
    other.sort_indices()
    np.testing.assert_array_equal(graph.indices, other.indices)
    np.testing.assert_array_equal(graph.data, other.data)
    rows = np.repeat(np.arange(graph.shape[0]), np.diff(graph.indptr))
    assert np.count_nonzero(rows == graph.indices) == graph.shape[0]  # the diagonal


@pytest.mark.parametrize("eps", [0.6, None])
def test_people_who_are_easily_told_apart_are_found(eps):
    people = np.repeat(np.arange(60), 16)
    features = np.random.default_rng(1).standard_normal((60, 64))[people]
    features += 0.5 * np.random.default_rng(2).standard_normal(features.shape)
    order = np.random.default_rng(3).permutation(len(people))
    found = cluster(
        features[order].astype(np.float32), ClusterConfig(k1=20, k2=6, eps=eps)
    )
    assert found.count == 60
    assert adjusted_rand_score(people[order], found.labels) >= 0.99


def test_permuted_images_get_permuted_labels():
    features = _people(6)
    order = np.random.default_rng(0).permutation(len(features))
    labels = cluster(features, ClusterConfig(k1=10, k2=3, eps=0.5)).labels
    others = cluster(features[order], ClusterConfig(k1=10, k2=3, eps=0.5)).labels
    assert adjusted_rand_score(labels[order], others) == 1
    np.testing.assert_array_equal(labels[order] == OUTLIER, others == OUTLIER)


def test_two_groups_and_an_outlier_are_found():
    distances = np.ones((11, 11))
    distances[:5, :5] = distances[5:10, 5:10] = 0.2
    np.fill_diagonal(distances, 0)
    np.testing.assert_array_equal(
        dbscan(_graph(distances), 0.5, 4), [0] * 5 + [1] * 5 + [OUTLIER]
    )


def test_an_image_between_two_clusters_goes_to_the_lower_number():
    distances = np.ones((11, 11))
    distances[:5, :5] = distances[5:10, 5:10] = 0.2
    distances[10, [0, 5]] = distances[[0, 5], 10] = 0.4  # near one core image of each
    np.fill_diagonal(distances, 0)
    assert dbscan(_graph(distances), 0.5, 4)[10] == 0


def test_without_an_eps_that_of_the_most_clusters_is_taken_the_smallest_of_equals():
    features = KINDS["twice"]()
    table = dict(clusters_by_eps(jaccard_graph(features, 10, 3), 4))
    assert tuple(table) == EPS
    most = max(table.values())
    assert [eps for eps, count in table.items() if count == most] == [0.4, 0.45]
    found = cluster(features, ClusterConfig(k1=10, k2=3, eps=None))
    assert (found.eps, found.count) == (0.4, most)


def test_no_full_matrix_is_held():
    features = _people(8, 312, 16, width=64)
    tracemalloc.start()
    found = cluster(features, ClusterConfig(k1=30, k2=6, eps=None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6 < 4 * len(features) ** 2
    assert found.count > 200


def test_a_collapse_is_said_with_the_clusters_by_eps():
    with pytest.raises(RunError, match=r"none of 60 images.* by eps: 0.3 \d.*0.7 \d"):
        cluster(KINDS["noise"](), ClusterConfig(k1=10, k2=3, eps=0.01))
    with pytest.raises(RunError, match="60 of 60 images are in one cluster at eps=0.6"):
        cluster(_people(9, 1, 60), ClusterConfig(k1=30, k2=6, eps=0.6))


def test_doubtful_clusters_are_said_in_words():
    labels = np.array([0] * 30 + [1] * 4 + [OUTLIER] * 6, np.int32)
    nowhere = np.zeros(len(labels), np.int32)
    said = [*clustering.doubts(Clusters(labels=labels, eps=0.6), nowhere, 3).values()]
    assert [text[:28] for text in said] == [
        "One cluster holds 30 of 40 i",
        "There are 2 clusters, and a ",
    ]
    labels = np.array([0] * 4 + [1] * 4 + [OUTLIER] * 92, np.int32)
    cameras = np.array([0] * 4 + [1] * 96)
    said = [*clustering.doubts(Clusters(labels=labels, eps=0.6), cameras, 2).values()]
    assert said[0].startswith("92 of 100 images are in no cluster")
    assert said[1].startswith("Only 0 of 2 clusters have images of two")
    labels = np.repeat(np.arange(10, dtype=np.int32), 4)
    found = Clusters(labels=labels, eps=0.6)
    assert not clustering.doubts(found, np.arange(40) % 2, 10)


def test_the_agreement_is_over_what_is_clustered_both_times():
    before = np.array([0, 0, 1, 1, 2, OUTLIER], np.int32)
    after = np.array([5, 5, 3, 3, OUTLIER, 3], np.int32)
    assert clustering.agreement(before, after) == 1.0
    assert clustering.agreement(before, np.full(6, OUTLIER, np.int32)) == 0.0


def test_proxies_are_the_images_of_one_camera_in_one_cluster():
    labels = np.array([0, 1, 0, OUTLIER, 1, 0], np.int32)
    cameras = np.array([2, 7, 5, 2, 7, 2])
    proxies, parents = clustering.camera_proxies(labels, cameras)
    np.testing.assert_array_equal(proxies, [0, 2, 1, OUTLIER, 2, 0])
    np.testing.assert_array_equal(parents, [0, 0, 1])
    found = Clusters(labels=labels, eps=0.6)
    assert clustering.num_across_cameras(found, cameras) == 1
    assert found.outliers == 1
    assert found.sizes.tolist() == [3, 2]
