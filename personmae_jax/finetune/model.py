"""The network that is fine-tuned: the encoder, a batch norm (BNNeck), a classifier.

Parameters:
  encoder: Of the ViT.
  bottleneck/scale (d,): Of the batch norm, whose bias stays 0, as in BNNeck.
  classifier/kernel (d, c): Without a bias.
  camera_embed (cameras, d): With `head.use_cameras` only.

Sources: Luo et al., arXiv 1903.07071 (BNNeck); TransReID, model/make_model.py, and
arXiv 2102.04378, section 3.3 (SIE).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, UInt8

from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.models import personmae
from personmae_jax.models.batch_norm import normalise
from personmae_jax.reid.features import Encode, encode_tokens


def init_params(
    cfg: FinetuneConfig,
    key: Array,
    num_identities: int,
    num_cameras: int,
    encoder: PyTree | None = None,
) -> dict[str, Any]:
    """Returns the initial float32 parameters; random where there is no `encoder`."""
    d = cfg.encoder.width
    keys = jax.random.split(key, 3)
    if encoder is None:
        encoder = personmae.init_encoder(cfg.encoder, cfg.grid, keys[0])
    params = {
        # Copied, because a train step takes the state's memory over.
        "encoder": jax.tree.map(jnp.copy, encoder),
        "bottleneck": {"scale": jnp.ones(d)},
        "classifier": {  # normal of 0.001: TransReID, `weights_init_classifier`
            "kernel": 0.001 * jax.random.normal(keys[1], (d, num_identities))
        },
    }
    if cfg.head.use_cameras:  # truncated normal of 0.02: TransReID's SIE
        params["camera_embed"] = 0.02 * jax.random.truncated_normal(
            keys[2], -2.0, 2.0, (num_cameras, d)
        )
    return params


def encode(
    cfg: FinetuneConfig,
    params: PyTree,
    images: UInt8[Array, "b height width 3"],
    cameras: Int[Array, " b"],
    **how: Any,
) -> Float[Array, "b d"]:
    """The float32 cls token after the final norm; `how`: of `personmae.encode`."""
    side_info = None
    if cfg.head.use_cameras:
        side_info = cfg.head.camera_scale * params["camera_embed"][cameras]
    tokens = encode_tokens(
        *(cfg.encoder, cfg.data, params["encoder"], images),
        side_info=side_info,
        remat=cfg.train.remat,
        **how,
    )
    return tokens[:, 0]


def make_encode(cfg: FinetuneConfig, dtype: DTypeLike) -> Encode:
    """Returns (params, images, cameras) -> the features that retrieval ranks by.

    Its `params` are a dict of the network's `params` and the batch norm's running
    `statistics`; the cameras are numbers of `sampling.camera_numbers`.
    """

    def encode_images(state: PyTree, images: Array, cameras: Array) -> Array:
        params = state["params"]
        features = encode(cfg, params, images, cameras, dtype=dtype)
        if cfg.head.feature == "before":
            return features
        scale = params["bottleneck"]["scale"]
        return normalise(features, scale, state["statistics"])

    return encode_images
