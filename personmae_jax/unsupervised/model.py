"""The network that is trained without labels: the encoder and a batch norm (BNNeck).

Its feature of unit length is clustered, contrasted with the memory, and ranked by.

Parameters:
  encoder: Of the ViT.
  bottleneck/scale (d,): Of the batch norm, whose bias stays 0.

Source: damo-cv/TransReID-SSL, cluster-contrast-reid; as there, the batch norm starts
with mean 0, variance 1 and scale 1, also where the encoder was fine-tuned with one.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, UInt8

from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.models import personmae
from personmae_jax.reid import features


def init_params(
    cfg: UnsupervisedConfig, key: Array, encoder: PyTree | None = None
) -> dict[str, Any]:
    """Returns the initial float32 parameters; random where there is no `encoder`."""
    if encoder is None:
        encoder = personmae.init_encoder(cfg.encoder, cfg.grid, key)
    return {
        # Copied, because a train step takes the state's memory over.
        "encoder": jax.tree.map(jnp.copy, encoder),
        "bottleneck": {"scale": jnp.ones(width(cfg))},
    }


def width(cfg: UnsupervisedConfig) -> int:
    """Length of the feature, that of a vector of the memory, too."""
    return features.feature_width(cfg.head.feature, cfg.grid, cfg.encoder.width)


def encode(
    cfg: UnsupervisedConfig,
    params: PyTree,
    images: UInt8[Array, "b height width 3"],
    **how: Any,
) -> Float[Array, "b d"]:
    """The float32 feature before the batch norm; `how`: of `personmae.encode`."""
    tokens = features.encode_tokens(
        cfg.encoder, cfg.data, params["encoder"], images, **how, remat=cfg.train.remat
    )
    return features.pool(tokens, cfg.head.feature, cfg.grid)
