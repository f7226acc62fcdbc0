"""The cluster memory: one unit vector a cluster, contrasted with and moved by a batch.

Its rows are `capacity`, of which the first `num_clusters` are used, so that nothing
compiles anew when their number changes.

Source: damo-cv/TransReID-SSL, cluster-contrast-reid, clustercontrast/models/cm.py
(CM_Hard); there, instances come one after another, here a tie is averaged.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def contrast_loss(
    features: Float[Array, "b d"],
    labels: Int[Array, " b"],
    memory: Float[Array, "capacity d"],
    num_clusters: Int[Array, ""],
    temperature: float,
) -> Float[Array, ""]:
    """Mean cross-entropy of each image's own cluster among all that are used.

    Args:
      features: Of unit length, float32.
      labels: Cluster of every image, 0 .. num_clusters - 1.
      memory: Rows of unit length; gets no gradient, and unused rows change nothing.
      num_clusters: Rows in use.
      temperature: That cosines are divided by.
    """
    is_used = jnp.arange(len(memory)) < num_clusters
    memory = jax.lax.stop_gradient(jnp.where(is_used[:, None], memory, 0.0))
    cosines = jnp.matmul(features, memory.T, precision=jax.lax.Precision.HIGHEST)
    logits = jnp.where(is_used[None, :], cosines / temperature, -jnp.inf)
    log_shares = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_shares, labels[:, None], axis=1))


def updated(
    memory: Float[Array, "capacity d"],
    features: Float[Array, "b d"],
    labels: Int[Array, " b"],
    momentum: float,
) -> Float[Array, "capacity d"]:
    """Moves every cluster of the batch towards its image that is least like it.

    The order of the rows does not matter: images that are equally unlike are averaged.
    """
    capacity = len(memory)
    cosines = jnp.sum(features * memory[labels], axis=1)
    least = jax.ops.segment_min(cosines, labels, capacity)
    weights = (cosines <= least[labels]).astype(jnp.float32)
    count = jax.ops.segment_sum(weights, labels, capacity)[:, None]
    total = jax.ops.segment_sum(weights[:, None] * features, labels, capacity)
    moved = momentum * memory + (1.0 - momentum) * total / jnp.maximum(count, 1.0)
    length = jnp.linalg.norm(moved, axis=1, keepdims=True)
    return jnp.where(count > 0, moved / jnp.maximum(length, 1e-12), memory)
