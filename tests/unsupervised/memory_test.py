"""Promises of the cluster memory: CM_Hard, and padding that changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np

from personmae_jax.unsupervised.memory import contrast_loss, updated


def _unit(values):
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def _inputs():
    rng = np.random.default_rng(0)
    memory = _unit(rng.standard_normal((6, 8))).astype(np.float32)
    features = _unit(rng.standard_normal((12, 8))).astype(np.float32)
    return memory, features, jnp.asarray(np.repeat(np.arange(3), 4))


def test_the_loss_is_a_cross_entropy_over_the_used_rows_and_padding_changes_no_bit():
    memory, features, labels = _inputs()
    logits = features @ memory[:3].T / 0.05
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(shares[np.arange(12), labels]).mean()
    grad = jax.value_and_grad(contrast_loss, argnums=(0, 2))
    loss, (gradient, of_memory) = grad(
        jnp.asarray(features), labels, jnp.asarray(memory), jnp.int32(3), 0.05
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not np.asarray(of_memory).any()
    memory[3:] = np.nan
    other, (same, _) = grad(
        jnp.asarray(features), labels, jnp.asarray(memory), jnp.int32(3), 0.05
    )
    np.testing.assert_array_equal(loss, other)
    np.testing.assert_array_equal(gradient, same)


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
