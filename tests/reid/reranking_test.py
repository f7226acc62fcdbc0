"""Promises of k-reciprocal re-ranking: the full-matrix algorithm, in blocks."""

import numpy as np
import pytest

from personmae_jax.reid.reranking import rerank
from personmae_jax.reid.retrieval import People, cosine_distances, score


def _unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def _dense(query, gallery, k1, k2, old_weight):
    """The paper's algorithm image by image on full matrices, in float64."""
    images = _unit(np.concatenate([query, gallery]).astype(np.float64))
    old = 1 - images @ images.T
    old /= old.max(axis=1, keepdims=True)
    order = np.argsort(old, axis=1, kind="stable")

    def reciprocal(i, k):
        return {j for j in order[i, : k + 1] if i in order[j, : k + 1]}

    vectors = np.zeros_like(old)
    for i in range(len(images)):
        members = set(reciprocal(i, k1))
        for j in reciprocal(i, k1):
            candidates = reciprocal(j, round(k1 / 2))
            if len(candidates & reciprocal(i, k1)) > 2 / 3 * len(candidates):
                members |= candidates
        members = sorted(members)
        weights = np.exp(-old[i, members])
        vectors[i, members] = weights / weights.sum()
    if k2 > 1:
        vectors = np.stack(
            [vectors[order[i, :k2]].mean(axis=0) for i in range(len(old))]
        )
    split = len(query)
    minima = np.minimum(vectors[:split, None], vectors[None, split:]).sum(axis=-1)
    maxima = np.maximum(vectors[:split, None], vectors[None, split:]).sum(axis=-1)
    return (1 - minima / maxima) * (1 - old_weight) + old_weight * old[:split, split:]


def _clusters(seed, num_people=8, num_images=9, width=12, spread=0.9):
    """Features of people in loose clusters, the first third of them queries."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((num_people, width))
    people = np.repeat(np.arange(num_people), num_images)
    features = centres[people] + spread * rng.standard_normal((len(people), width))
    order = rng.permutation(len(people))
    split = len(people) // 3
    parts = order[:split], order[split:]
    return [(features[part].astype(np.float32), people[part]) for part in parts]


@pytest.mark.parametrize(
    ("k1", "k2", "old_weight"), [(20, 6, 0.3), (7, 1, 0.0), (6, 3, 0.5), (5, 9, 0.3)]
)
@pytest.mark.parametrize("seed", range(3))
def test_reranked_distances_equal_the_dense_algorithm(seed, k1, k2, old_weight):
    (query, _), (gallery, _) = _clusters(seed)
    blocks = rerank(query, gallery, k1=k1, k2=k2, old_weight=old_weight)
    expected = _dense(query, gallery, k1, k2, old_weight)
    np.testing.assert_allclose(np.concatenate(list(blocks)), expected, atol=1e-6)


def test_of_equally_near_images_the_first_is_the_nearer_neighbour():
    """Cosines are quarters, exact in any arithmetic, so most images tie with others."""
    features = np.zeros((60, 8), np.float32)
    rng = np.random.default_rng(0)
    for row in features:
        row[rng.permutation(8)[:4]] = rng.choice([-0.5, 0.5], 4)
    query, gallery = features[:20], features[20:]
    blocks = rerank(query, gallery, k1=7, k2=3)
    expected = _dense(query, gallery, 7, 3, 0.3)
    np.testing.assert_allclose(np.concatenate(list(blocks)), expected, atol=1e-6)


def test_blocks_change_no_reranked_distance():
    (query, _), (gallery, _) = _clusters(0)
    (whole,) = rerank(query, gallery)
    blocks = list(rerank(query, gallery, block=5 * len(gallery)))
    assert [len(block) for block in blocks] == [5, 5, 5, 5, 4]
    np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)


def test_fewer_images_than_neighbours_are_reranked():
    (query, _), (gallery, _) = _clusters(0, num_people=2, num_images=3)
    blocks = rerank(query, gallery)
    expected = _dense(query, gallery, 20, 6, 0.3)
    np.testing.assert_allclose(np.concatenate(list(blocks)), expected, atol=1e-6)


def test_reranking_finds_more_in_loose_clusters():
    (query, who), (gallery, others) = _clusters(1, num_people=30, spread=1.0)
    people = People(who, np.zeros_like(who)), People(others, np.ones_like(others))
    old = score(cosine_distances(query, gallery), *people)
    new = score(rerank(query, gallery, k1=8, k2=3), *people)
    assert new.mAP > old.mAP + 0.05
