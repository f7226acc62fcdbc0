"""The batch norm between an encoder's feature and what is learned from it: BNNeck.

Its bias stays 0. Source: Luo et al., arXiv 1903.07071.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BATCH_NORM_EPSILON = 1e-5  # PyTorch's
_MOMENTUM = 0.1  # of the running statistics; PyTorch's


def init_statistics(width: int) -> dict[str, Float[Array, " d"]]:
    """The running statistics of the batch norm before the first step."""
    return {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def batch_norm(
    features: Float[Array, "b d"],
    scale: Float[Array, " d"],
    running: dict[str, Float[Array, " d"]],
) -> tuple[Float[Array, "b d"], dict[str, Float[Array, " d"]]]:
    """Normalises by the statistics of the global batch; returns the running ones too.

    Source: torch.nn.BatchNorm1d: the batch is normalised by its biased variance, and
    the running one takes in the unbiased.
    """
    mean, var = jnp.mean(features, axis=0), jnp.var(features, axis=0)
    unbiased = var * (len(features) / (len(features) - 1))
    updated = {
        name: (1.0 - _MOMENTUM) * running[name] + _MOMENTUM * new
        for name, new in (("mean", mean), ("var", unbiased))
    }
    return normalise(features, scale, {"mean": mean, "var": var}), updated


def normalise(
    features: Float[Array, "b d"],
    scale: Float[Array, " d"],
    statistics: dict[str, Float[Array, " d"]],
) -> Float[Array, "b d"]:
    """The batch norm by given statistics, e.g. the running ones."""
    factor = scale * jax.lax.rsqrt(statistics["var"] + BATCH_NORM_EPSILON)
    return (features - statistics["mean"][None]) * factor[None]
