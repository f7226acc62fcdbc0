"""Promises of the scores: the Market-1501 protocol, to the last tie."""

import dataclasses

import numpy as np
import pytest

from personmae_jax.errors import RunError
from personmae_jax.reid.datasets import JUNK
from personmae_jax.reid.retrieval import (
    People,
    cosine_distances,
    match_ranks,
    nearest,
    score,
)


def _people(*pairs):
    return People(*np.array(pairs, np.int64).reshape(-1, 2).T)


def _slow_scores(distances, query, gallery):
    """The protocol in plain Python, written from its definition."""
    aps, firsts, inps, lost = [], [], [], 0
    for row, who, where in zip(distances, query.identities, query.cameras, strict=True):
        places = []  # of the matches among what is looked through
        looked_through = 0
        # sorted() is stable, and so images at equal distance stay in gallery order.
        for index in sorted(range(len(row)), key=lambda index: row[index]):
            person, camera = gallery.identities[index], gallery.cameras[index]
            if person == JUNK or (person == who and camera == where):
                continue
            looked_through += 1
            if person == who:
                places.append(looked_through)
        if not places:
            lost += 1
            continue
        aps.append(sum((n + 1) / p for n, p in enumerate(places)) / len(places))
        inps.append(len(places) / places[-1])
        firsts.append(places[0])
    rank = {k: sum(p <= k for p in firsts) / len(firsts) for k in (1, 5, 10)}
    return {
        "mAP": sum(aps) / len(aps),
        "rank1": rank[1],
        "rank5": rank[5],
        "rank10": rank[10],
        "mINP": sum(inps) / len(inps),
        "queries": len(distances),
        "queries_without_match": lost,
        "gallery": sum(person != JUNK for person in gallery.identities),
    }


@pytest.mark.parametrize("levels", [3, 20, None], ids=["ties", "few ties", "no ties"])
@pytest.mark.parametrize("seed", range(5))
def test_scores_equal_a_slow_reference(levels, seed):
    rng = np.random.default_rng(seed)
    query = People(rng.integers(-1, 12, 40), rng.integers(0, 4, 40))
    gallery = People(rng.integers(-1, 12, 150), rng.integers(0, 4, 150))
    distances = rng.random((40, 150), np.float32)
    if levels:
        distances = np.floor(distances * levels)
    expected = _slow_scores(distances, query, gallery)
    assert expected["queries_without_match"]  # junk among the queries
    got = dataclasses.asdict(score([distances], query, gallery))
    assert got == pytest.approx(expected, rel=1e-12)


def test_scores_of_a_case_worked_by_hand():
    """One query, matches at places 2 and 5: AP = (1/2 + 2/5) / 2, INP = 2/5."""
    query = _people((7, 1))
    gallery = _people((3, 1), (7, 2), (4, 2), (0, 1), (7, 3))
    scores = score([np.float32([[1, 2, 3, 4, 5]])], query, gallery)
    assert scores.mAP == pytest.approx(0.45)
    assert scores.mINP == pytest.approx(0.4)
    assert (scores.rank1, scores.rank5, scores.rank10) == (0, 1, 1)
    assert (scores.queries, scores.queries_without_match, scores.gallery) == (1, 0, 5)


def test_same_identity_and_camera_and_junk_are_removed_and_distractors_kept():
    query = _people((7, 1))
    row = np.float32([1, 2, 3, 4])
    gallery = _people((7, 1), (JUNK, 2), (0, 2), (7, 2))
    np.testing.assert_array_equal(match_ranks(row, 7, 1, gallery), [2])
    scores = score([row[None]], query, gallery)
    assert (scores.mAP, scores.gallery) == (0.5, 3)


def test_queries_without_a_match_are_counted_and_left_out_of_the_means():
    query = _people((7, 1), (8, 1), (JUNK, 1))
    gallery = _people((7, 2), (8, 1), (JUNK, 2))
    scores = score([np.zeros((3, 3), np.float32)], query, gallery)
    assert (scores.mAP, scores.rank1) == (1, 1)
    assert (scores.queries, scores.queries_without_match) == (3, 2)
    with pytest.raises(RunError, match="none of 1 queries"):
        score([np.zeros((1, 3), np.float32)], _people((8, 1)), gallery)


def test_at_equal_distance_the_first_in_the_gallery_is_first():
    tied = np.zeros(4, np.float32)
    first = _people((7, 1), (7, 2), (5, 2), (5, 2))  # (7, 1) is removed
    last = _people((7, 1), (5, 2), (5, 2), (7, 2))
    np.testing.assert_array_equal(match_ranks(tied, 7, 1, first), [1])
    np.testing.assert_array_equal(match_ranks(tied, 7, 1, last), [3])
    many = People(np.arange(900), np.full(900, 2))  # too many for a lucky order
    order, _ = nearest(np.tile(np.float32([1, 0]), 450), 7, 1, many, 900)
    np.testing.assert_array_equal(order, [*range(1, 900, 2), *range(0, 900, 2)])


def test_a_distance_that_is_not_finite_is_refused():
    gallery = _people((7, 1), (7, 2), (5, 2))
    for wrong in (np.nan, np.inf):
        with pytest.raises(RunError, match="not finite"):
            match_ranks(np.float32([0, 1, wrong]), 7, 1, gallery)


def test_blocks_change_no_score():
    rng = np.random.default_rng(0)
    # Whole numbers of equal length, so that every product is exact in any block.
    query, gallery = (
        np.where(rng.random((n, 16)) < 0.5, -1, 1).astype(np.float32) for n in (30, 90)
    )
    of_query = People(rng.integers(0, 9, 30), rng.integers(0, 3, 30))
    of_gallery = People(rng.integers(0, 9, 90), rng.integers(0, 3, 90))
    whole = score(cosine_distances(query, gallery), of_query, of_gallery)
    for block in (1, 90, 7 * 90 + 1):
        blocks = list(cosine_distances(query, gallery, block))
        assert all(b.size <= max(block, 90) for b in blocks)
        assert score(blocks, of_query, of_gallery) == whole


def test_rows_that_do_not_fit_the_queries_are_refused():
    gallery = _people((7, 2), (5, 2))
    for rows in (1, 3):
        with pytest.raises(ValueError, match="zip"):
            score([np.zeros((rows, 2))], _people((7, 1), (5, 1)), gallery)


def test_distances_are_those_of_the_directions():
    query, gallery = np.float32([[2, 0]]), np.float32([[9, 0], [0, 0.1], [-3, 0]])
    (block,) = cosine_distances(query, gallery)
    np.testing.assert_allclose(block, [[0, 1, 2]], atol=1e-6)


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
def test_features_without_a_direction_are_refused(wrong):
    features = np.ones((3, 4), np.float32)
    broken = features.copy()
    broken[1] = wrong
    with pytest.raises(RunError, match="zero or not finite"):
        list(cosine_distances(features, broken))


def test_nearest_images_are_those_that_the_scores_see():
    gallery = _people((7, 1), (JUNK, 2), (5, 2), (7, 2), (5, 3))
    row = np.float32([0, 0, 1, 1, 0.5])
    order, is_match = nearest(row, 7, 1, gallery, 2)
    np.testing.assert_array_equal(order, [4, 2])
    np.testing.assert_array_equal(is_match, [False, False])
    order, is_match = nearest(row, 7, 1, gallery, 10)
    np.testing.assert_array_equal(order, [4, 2, 3])
    np.testing.assert_array_equal(np.flatnonzero(is_match) + 1, [3])
    np.testing.assert_array_equal(match_ranks(row, 7, 1, gallery), [3])
