"""Losses of fine-tuning against slow references and values by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personmae_jax.finetune.losses import identity_loss, triplet_loss

RNG = np.random.default_rng(0)


def slow_identity_loss(logits, labels, smoothing) -> float:
    total = 0.0
    for row, label in zip(logits, labels, strict=True):
        shares = [math.exp(x) for x in row]
        for number, share in enumerate(shares):
            target = smoothing / len(row) + (1 - smoothing) * (number == label)
            total -= target * math.log(share / sum(shares))
    return total / len(logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_the_identity_loss_is_that_of_a_slow_reference(smoothing):
    logits = RNG.standard_normal((6, 5)).astype(np.float32)
    labels = np.array([0, 4, 2, 2, 1, 3])
    loss = identity_loss(jnp.asarray(logits), jnp.asarray(labels), smoothing)
    expected = slow_identity_loss(logits.astype(float), labels, smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def slow_triplet_loss(features, labels) -> float:
    losses = []
    for anchor, label in zip(features, labels, strict=True):
        far, near = 0.0, math.inf
        for other, name in zip(features, labels, strict=True):
            distance = math.dist(anchor, other)
            if name == label:
                far = max(far, distance)
            else:
                near = min(near, distance)
        losses.append(math.log(1 + math.exp(far - near)))
    return sum(losses) / len(losses)


def test_the_triplet_loss_is_that_of_a_slow_reference():
    features = RNG.standard_normal((12, 7)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2, 2, 3])
    loss = triplet_loss(jnp.asarray(features), jnp.asarray(labels))
    np.testing.assert_allclose(
        loss, slow_triplet_loss(features.astype(float), labels), rtol=1e-5
    )


def test_the_triplet_loss_by_hand():
    # On a line at 0, 3 (one person) and 5, 6: farthest 3, 3, 1, 1; nearest 5, 2, 2, 3.
    features = jnp.array([[0.0], [3.0], [5.0], [6.0]])
    loss = triplet_loss(features, jnp.array([0, 0, 1, 1]))
    expected = [math.log1p(math.exp(x)) for x in (3 - 5, 3 - 2, 1 - 2, 1 - 3)]
    np.testing.assert_allclose(loss, np.mean(expected), rtol=1e-5)


def test_equal_features_have_a_finite_gradient():
    features, labels = jnp.ones((4, 3)), jnp.array([0, 0, 1, 1])
    loss, gradient = jax.value_and_grad(triplet_loss)(features, labels)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_the_order_of_a_batch_changes_nothing():
    features = jnp.asarray(RNG.standard_normal((8, 4)).astype(np.float32))
    labels, order = jnp.arange(8) // 2, RNG.permutation(8)
    np.testing.assert_allclose(
        triplet_loss(features, labels),
        triplet_loss(features[order], labels[order]),
        rtol=1e-6,
    )
