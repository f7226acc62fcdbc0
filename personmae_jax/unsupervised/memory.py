"""The cluster memory: unit vectors of clusters, contrasted with and moved by a batch.

There are as many rows as images, of which the first `num_rows` are used, so that
nothing compiles anew when the number of clusters changes. A row is a cluster, or what
one camera saw of it.

Sources: damo-cv/TransReID-SSL, cluster-contrast-reid, clustercontrast/models/cm.py
(CM_Hard); there, instances come one after another, here a tie is averaged. Proxies of
cameras: Wang et al., arXiv 2012.10674 (CAP).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from personmae_jax.config_unsupervised import MemoryConfig

Vectors = Float[Array, "rows d"]


class Memory(NamedTuple):
    """What a clustering leaves for the steps on it."""

    # Of unit length; those of unused rows are 0.
    vectors: Float[Array, "rows d"] | Float32[np.ndarray, "rows d"]
    clusters: Int[Array, " rows"] | Int32[np.ndarray, " rows"]
    # All 0 where a row is a whole cluster.
    cameras: Int[Array, " rows"] | Int32[np.ndarray, " rows"]
    num_rows: Int[Array, ""] | Int32[np.ndarray, ""]  # in use


def centroids(
    features: Float32[np.ndarray, "n d"],
    rows: Int32[np.ndarray, " n"],
    clusters: Int32[np.ndarray, " _r"],
    cameras: Int32[np.ndarray, " _r"],
) -> Memory:
    """The mean direction of each row's images, in a memory with a row for each image.

    An image of a row below 0 is in none; `clusters` and `cameras` are of used rows.
    """
    n, used = len(features), len(clusters)
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    vectors = np.zeros(features.shape, np.float64)
    np.add.at(vectors, rows[rows >= 0], units[rows >= 0])
    lengths = np.linalg.norm(vectors[:used], axis=1, keepdims=True)
    vectors[:used] /= np.maximum(lengths, 1e-12)
    return Memory(
        vectors=vectors.astype(np.float32),
        clusters=np.pad(clusters, (0, n - used)).astype(np.int32),
        cameras=np.pad(cameras, (0, n - used)).astype(np.int32),
        num_rows=np.array(used, np.int32),
    )


def similarities(
    features: Float[Array, "b d"], memory: Memory, temperature: float
) -> Float[Array, "b rows"]:
    """Cosines over the temperature; -inf for rows that are not used.

    The memory gets no gradient, and what stands in unused rows changes nothing.
    """
    is_used = jnp.arange(len(memory.vectors)) < memory.num_rows
    vectors = jax.lax.stop_gradient(jnp.where(is_used[:, None], memory.vectors, 0.0))
    cosines = features @ vectors.T
    return jnp.where(is_used[None, :], cosines / temperature, -jnp.inf)


def contrast_loss(
    logits: Float[Array, "b rows"], labels: Int[Array, " b"]
) -> Float[Array, ""]:
    """Mean cross-entropy of each image's own row among all that are used."""
    return -jnp.mean(_at(jax.nn.log_softmax(logits), labels))


def proxy_loss(
    logits: Float[Array, "b rows"],
    labels: Int[Array, " b"],
    memory: Memory,
    cfg: MemoryConfig,
) -> Float[Array, ""]:
    """Mean loss within each image's camera, and of its cluster across cameras.

    Within: cross-entropy among the rows of the image's camera. Across: all rows of its
    cluster, each with an equal share, against the nearest rows of other clusters.

    Source: CAP, equations 5 and 8, in every round.
    """
    own_camera = memory.cameras[labels][:, None] == memory.cameras[None, :]
    within = jax.nn.log_softmax(jnp.where(own_camera, logits, -jnp.inf))
    own_cluster = memory.clusters[labels][:, None] == memory.clusters[None, :]
    own_cluster &= jnp.isfinite(logits)  # of the used rows
    count = min(cfg.num_negatives, logits.shape[1])
    negatives, _ = jax.lax.top_k(jnp.where(own_cluster, -jnp.inf, logits), count)
    positives = jnp.where(own_cluster, logits, -jnp.inf)
    total = jax.nn.logsumexp(jnp.concatenate([positives, negatives], axis=1), axis=1)
    mean = jnp.sum(jnp.where(own_cluster, logits, 0.0), axis=1)
    mean /= jnp.sum(own_cluster, axis=1)
    return jnp.mean(cfg.cross_camera_weight * (total - mean) - _at(within, labels))


def updated(
    vectors: Vectors,
    features: Float[Array, "b d"],
    labels: Int[Array, " b"],
    momentum: float,
) -> Vectors:
    """Moves every row of the batch towards its image that is least like it.

    The order of the images does not matter: those that are equally unlike are averaged.
    """
    rows = len(vectors)
    cosines = jnp.sum(features * vectors[labels], axis=1)
    least = jax.ops.segment_min(cosines, labels, rows)
    weights = (cosines <= least[labels]).astype(jnp.float32)
    count = jax.ops.segment_sum(weights, labels, rows)[:, None]
    total = jax.ops.segment_sum(weights[:, None] * features, labels, rows)
    moved = momentum * vectors + (1.0 - momentum) * total / jnp.maximum(count, 1.0)
    length = jnp.linalg.norm(moved, axis=1, keepdims=True)
    return jnp.where(count > 0, moved / jnp.maximum(length, 1e-12), vectors)


def _at(values: Float[Array, "b rows"], labels: Int[Array, " b"]) -> Float[Array, " b"]:
    return jnp.take_along_axis(values, labels[:, None], axis=1)[:, 0]
