"""Promises of the cluster memory: CM_Hard, and padding that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from personmae_jax.config_unsupervised import MemoryConfig
from personmae_jax.unsupervised.memory import (
    Memory,
    centroids,
    contrast_loss,
    proxy_loss,
    similarities,
    updated,
)


def _unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def _inputs():
    rng = np.random.default_rng(0)
    memory = _unit(rng.standard_normal((6, 8))).astype(np.float32)
    features = _unit(rng.standard_normal((12, 8))).astype(np.float32)
    return memory, features, jnp.asarray(np.repeat(np.arange(3), 4))


def _memory(vectors, clusters=(0, 1, 2, 0, 0, 0), cameras=(0,) * 6) -> Memory:
    numbers = (jnp.array(clusters), jnp.array(cameras), jnp.int32(3))
    return Memory(jnp.asarray(vectors), *numbers)


def test_the_loss_is_a_cross_entropy_over_the_used_rows_and_padding_changes_no_bit():
    vectors, features, labels = _inputs()
    logits = features @ vectors[:3].T / 0.05
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(shares[np.arange(12), labels]).mean()

    @jax.value_and_grad
    def both(arrays):
        features, vectors = arrays
        logits = similarities(features, _memory(vectors), 0.05)
        return contrast_loss(logits, labels)

    loss, (gradient, of_memory) = both((jnp.asarray(features), jnp.asarray(vectors)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not np.asarray(of_memory).any()
    vectors[3:] = np.nan
    other, (same, _) = both((jnp.asarray(features), jnp.asarray(vectors)))
    np.testing.assert_array_equal(loss, other)
    np.testing.assert_array_equal(gradient, same)


def test_proxies_are_told_apart_within_a_camera_and_pulled_together_across():
    """Rows: cluster 0 in cameras 0 and 1, cluster 1 in 0, cluster 2 in 1; 2 unused."""
    vectors, features, _ = _inputs()
    clusters, cameras = np.array([0, 0, 1, 2, 0, 0]), np.array([0, 1, 0, 1, 0, 0])
    labels = np.array([0, 1, 2, 3] * 3)
    memory = _memory(vectors, clusters, cameras)._replace(num_rows=jnp.int32(4))
    logits = features @ vectors[:4].T / 0.05
    expected = []
    for row, own in zip(logits.astype(np.float64), labels, strict=True):
        within = row[cameras[:4] == cameras[own]]
        same = clusters[:4] == clusters[own]
        nearest = row[~same].max()  # of the two or three others, one is taken
        total = np.log(np.exp(row[same]).sum() + np.exp(nearest))
        expected.append(np.log(np.exp(within).sum()) - row[own])
        expected[-1] += 0.5 * (total - row[same]).mean()
    similar = similarities(jnp.asarray(features), memory, 0.05)
    found = proxy_loss(
        *(similar, jnp.asarray(labels), memory), MemoryConfig(num_negatives=1)
    )
    np.testing.assert_allclose(found, np.mean(expected), rtol=1e-5)


def test_padding_changes_no_bit_of_the_loss_of_proxies_nor_has_memory_a_gradient():
    vectors, features, _ = _inputs()
    labels = jnp.asarray([0, 1, 2, 3] * 3)

    @jax.jit
    def all_of(bank):
        def loss(features, vectors):
            similar = similarities(features, bank._replace(vectors=vectors), 0.05)
            return proxy_loss(similar, labels, bank, MemoryConfig())

        both = jax.value_and_grad(loss, argnums=(0, 1))
        return both(jnp.asarray(features), bank.vectors)

    found = []
    for number, vectors[4:] in ((0, 0), (1, np.nan)):
        bank = _memory(vectors, (0, 0, 1, 2, number, number), (0, 1, 0, 1, 0, number))
        loss, (gradient, of_memory) = all_of(bank._replace(num_rows=jnp.int32(4)))
        assert np.isfinite(gradient).all()
        assert np.asarray(gradient).any()
        assert not np.asarray(of_memory).any()
        found.append((loss, gradient))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_centroid_is_the_mean_direction_of_its_images():
    _, features, _ = _inputs()
    rows = np.array([0, 0, 1, -1, 1, 1, 0, -1, 2, 2, 2, 2], np.int32)
    numbers = np.array([0, 1, 1], np.int32), np.array([0, 0, 1], np.int32)
    memory = centroids(features * 3, rows, *numbers)
    assert memory.num_rows == 3
    assert len(memory.vectors) == 12
    assert not memory.vectors[3:].any()
    for row in range(3):
        mean = features[rows == row].mean(axis=0)
        np.testing.assert_allclose(memory.vectors[row], _unit(mean), atol=1e-6)
    np.testing.assert_array_equal(memory.cameras[:4], [0, 0, 1, 0])


def test_the_update_is_that_of_the_hardest_image_in_any_order_of_rows():
    memory, features, labels = _inputs()
    expected = memory.copy()
    for c in range(3):
        own = features[labels == c]
        hardest = own[np.argmin(own @ memory[c])]
        expected[c] = _unit(0.2 * memory[c] + 0.8 * hardest)
    found = updated(jnp.asarray(memory), jnp.asarray(features), labels, 0.2)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(found[3:], memory[3:])
    order = np.random.default_rng(1).permutation(12)
    again = updated(
        jnp.asarray(memory), jnp.asarray(features)[order], labels[order], 0.2
    )
    np.testing.assert_allclose(found, again, atol=1e-6)


def test_rows_keep_length_1_after_many_updates():
    memory, features, labels = _inputs()
    update = jax.jit(lambda memory: updated(memory, jnp.asarray(features), labels, 0.2))
    memory = jnp.asarray(memory)
    for _ in range(1000):
        memory = update(memory)
    np.testing.assert_allclose(np.linalg.norm(memory, axis=1), 1, atol=1e-6)
