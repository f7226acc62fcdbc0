"""Promises of the distances on the devices: those of the host, a block at a time."""

import jax
import numpy as np
import pytest

from personmae_jax import sharding
from personmae_jax.reid.distances import CosineDistances
from personmae_jax.reid.reranking import rerank
from personmae_jax.reid.retrieval import cosine_distances


def features(count, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 24), np.float32)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", [1, 5 * 53, 10**6])
def test_distances_equal_those_of_the_host(devices, block):
    query, gallery = features(18), 7 * features(53, seed=1)
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    blocks = list(CosineDistances(mesh, block)(query, gallery))
    rows = {1: 1, 5 * 53: 5, 10**6: 18}[block]
    assert [len(b) for b in blocks] == [rows] * (18 // rows) + [18 % rows] * (
        18 % rows > 0
    )
    (expected,) = cosine_distances(query, gallery)
    np.testing.assert_allclose(np.concatenate(blocks), expected, atol=1e-6)


def test_reranking_takes_them():
    query, gallery = features(18), features(53, seed=1)
    (expected,) = rerank(query, gallery)
    distances = CosineDistances(sharding.make_mesh(), 5 * 53)
    got = np.concatenate(list(rerank(query, gallery, distances=distances)))
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_no_device_and_no_host_holds_more_than_blocks():
    """A matrix of all distances would be 16 MB here; a block is 64 kB."""
    query, gallery = features(2000), features(2000, seed=1)
    distances = CosineDistances(sharding.make_mesh(), 8 * 2000)
    largest = max(b.nbytes for b in distances(query, gallery))
    assert largest == 8 * 2000 * 4
    stream = distances(query, gallery)
    next(stream)
    held = max(x.nbytes for x in jax.live_arrays())
    assert held <= max(largest, gallery.nbytes)


@pytest.mark.parametrize("wrong", [0.0, np.nan, np.inf])
def test_features_without_a_direction_are_refused(wrong):
    broken = features(9)
    broken[3] = wrong
    distances = CosineDistances(sharding.make_mesh())
    for pair in ((broken, features(9)), (features(9), broken)):
        with pytest.raises(ValueError, match="zero or not finite"):
            next(distances(*pair))
