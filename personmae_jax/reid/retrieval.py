"""Retrieval scores by the Market-1501 protocol: mAP, CMC and mINP.

For a query, gallery images of the same identity and the same camera are taken away,
and so is junk; everybody else stays, distractors included. The rest is ordered by
distance, and images at equal distance by their place in the gallery, the first first.
A query of which nothing is left to find is counted and left out of the means.

Sources: the protocol, Zheng et al., Scalable Person Re-identification (ICCV 2015); AP
is the mean of the precision at every match, as torchreid and fast-reid have it (the
authors' MATLAB code averages it with the precision before the match); mINP, Ye et
al., arXiv 2001.04193, section 3.4.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Float, Float32, Int64

from personmae_jax.errors import RunError
from personmae_jax.reid.datasets import JUNK, ReidDataset

BLOCK = 2**26  # distances held at once by default: 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """Means over the queries that have a match, as fractions."""

    mAP: float
    rank1: float
    rank5: float
    rank10: float
    mINP: float
    queries: int  # all of them
    queries_without_match: int  # of these; not in the means
    gallery: int  # images, without junk


@dataclasses.dataclass(frozen=True, eq=False)
class People:
    """Who is in a list of images, and which camera saw them."""

    identities: Int64[np.ndarray, " n"]
    cameras: Int64[np.ndarray, " n"]


def people_in(dataset: ReidDataset, records: Int64[np.ndarray, " n"]) -> People:
    """Who is in some records of a data set."""
    return People(dataset.identities[records], dataset.cameras[records])


def cosine_distances(
    query: Float32[np.ndarray, "q d"],
    gallery: Float32[np.ndarray, "g d"],
    block: int = BLOCK,
) -> Iterator[Float32[np.ndarray, "_b g"]]:
    """Yields 1 - cosine in blocks of queries, in order; all of them are q x g.

    It orders as the Euclidean distance of features of unit length does.

    Args:
      query: Features of the queries, of any length but 0.
      gallery: Features of the gallery.
      block: Distances in one block; at least one query is taken at a time.

    Raises:
      RunError: A feature is zero or not finite.
    """
    query, gallery = of_unit_length(query), of_unit_length(gallery)
    rows = max(1, block // len(gallery))
    for start in range(0, len(query), rows):
        cosines = query[start : start + rows] @ gallery.T
        yield np.subtract(1, cosines, out=cosines)  # a second block would take longer


def score(
    distances: Iterable[Float[np.ndarray, "_b g"]], query: People, gallery: People
) -> Scores:
    """Scores a retrieval.

    Args:
      distances: Blocks of queries, in order, to the whole gallery, as
        `cosine_distances` yields them; only their order within a query matters.
      query: The queries.
      gallery: The gallery.

    Raises:
      RunError: A distance is not finite, or no query has a match.
      ValueError: They are not one row for each query.
    """
    rows = (row for block in distances for row in block)
    people = zip(query.identities.tolist(), query.cameras.tolist(), strict=True)
    found = [
        match_ranks(row, identity, camera, gallery)
        for row, (identity, camera) in zip(rows, people, strict=True)
    ]
    ranks = [r for r in found if len(r)]
    if not ranks:
        raise RunError(
            f"cannot score: none of {len(found)} queries has a match in the gallery"
        )
    first = np.array([r[0] for r in ranks])
    hits = [np.arange(1, len(r) + 1) for r in ranks]  # matches up to each match
    return Scores(
        mAP=float(np.mean([np.mean(h / r) for h, r in zip(hits, ranks, strict=True)])),
        rank1=float(np.mean(first <= 1)),
        rank5=float(np.mean(first <= 5)),
        rank10=float(np.mean(first <= 10)),
        mINP=float(np.mean([len(r) / r[-1] for r in ranks])),
        queries=len(found),
        queries_without_match=len(found) - len(ranks),
        gallery=int(np.count_nonzero(gallery.identities != JUNK)),
    )


def match_ranks(
    row: Float[np.ndarray, " g"], identity: int, camera: int, gallery: People
) -> Int64[np.ndarray, " m"]:
    """Returns the places of one query's matches in its ranking, from 1, ascending.

    Sorting the bare distances and counting is 20 times faster than a stable argsort.
    """
    if not np.isfinite(row).all():
        raise RunError("cannot rank: a distance is not finite")
    is_ignored, is_match = _judge(identity, camera, gallery)
    matches = np.flatnonzero(is_match)
    row = np.where(is_ignored, np.inf, row)
    ordered = np.sort(row)
    before = np.searchsorted(ordered, row[matches], "left")
    tied = np.searchsorted(ordered, row[matches], "right") - before > 1
    for n in np.flatnonzero(tied):
        before[n] += np.count_nonzero(row[: matches[n]] == row[matches[n]])
    return np.sort(before) + 1


def nearest(
    row: Float[np.ndarray, " g"], identity: int, camera: int, gallery: People, k: int
) -> tuple[Int64[np.ndarray, " k"], np.ndarray]:
    """Returns the first k gallery images of one query, and which of them match.

    Fewer than k where the protocol leaves fewer.
    """
    is_ignored, is_match = _judge(identity, camera, gallery)
    order = np.argsort(row, kind="stable")
    order = order[~is_ignored[order]][:k]
    return order, is_match[order]


def _judge(
    identity: int, camera: int, gallery: People
) -> tuple[np.ndarray, np.ndarray]:
    """Which gallery images a query ignores, and which are its matches."""
    is_same = gallery.identities == identity
    is_seen = gallery.cameras == camera
    is_junk = gallery.identities == JUNK
    return is_junk | (is_same & is_seen), is_same & ~is_seen & ~is_junk


def of_unit_length(features: Float32[np.ndarray, "n d"]) -> Float32[np.ndarray, "n d"]:
    """Returns features of the same directions.

    Raises:
      RunError: A feature is zero or not finite.
    """
    lengths = np.sqrt(np.einsum("nd,nd->n", features, features))  # `norm` makes a copy
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise RunError("cannot rank: a feature is zero or not finite")
    return features / lengths[:, None]
