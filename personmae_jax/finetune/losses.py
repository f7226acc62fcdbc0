"""Losses of supervised re-identification: arrays in, scalars out, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def identity_loss(
    logits: Float[Array, "b c"], labels: Int[Array, " b"], smoothing: float
) -> Float[Array, ""]:
    """Mean cross-entropy against smoothed labels.

    Args:
      logits: Of the classifier.
      labels: The right class of every image.
      smoothing: Share of the target that is spread evenly over all classes, the right
        one included.

    Source: Szegedy et al., arXiv 1512.00567, section 7; `CrossEntropyLabelSmooth` in
    damo-cv/TransReID, loss/softmax_loss.py.
    """
    log_shares = jax.nn.log_softmax(logits.astype(jnp.float32))
    right = jnp.take_along_axis(log_shares, labels[:, None], axis=1)[:, 0]
    return -jnp.mean(
        (1.0 - smoothing) * right + smoothing * jnp.mean(log_shares, axis=1)
    )


def triplet_loss(
    features: Float[Array, "b d"], labels: Int[Array, " b"]
) -> Float[Array, ""]:
    """Mean of log(1 + exp(distance to the farthest of the same - nearest of another)).

    Distances are Euclidean, between all pairs of the global batch; every image is an
    anchor. There must be two identities or more.

    Source: Hermans et al., arXiv 1703.07737, batch hard with soft margin; as in
    damo-cv/TransReID, loss/triplet_loss.py, features are not normalised.
    """
    features = features.astype(jnp.float32)
    squares = jnp.sum(jnp.square(features), axis=1)
    products = features @ features.T
    squared = squares[:, None] + squares[None, :] - 2.0 * products
    # The floor keeps the root's gradient finite where two features are equal.
    distances = jnp.sqrt(jnp.maximum(squared, 1e-12))
    is_same = labels[:, None] == labels[None, :]
    farthest = jnp.max(jnp.where(is_same, distances, -jnp.inf), axis=1)
    nearest = jnp.min(jnp.where(is_same, jnp.inf, distances), axis=1)
    return jnp.mean(jax.nn.softplus(farthest - nearest))
