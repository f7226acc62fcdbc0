"""Features after the batch norm of a run that was fine-tuned or adapted."""

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from personmae_jax import pixels
from personmae_jax.config import EncoderConfig, ImageConfig
from personmae_jax.models import personmae
from personmae_jax.models.batch_norm import normalise
from personmae_jax.reid.features import Encode


def make_encode(
    encoder: EncoderConfig, data: ImageConfig, token: str, dtype: DTypeLike
) -> Encode:
    """Returns (params, images, cameras) -> features after the batch norm.

    Its `params` are a dict of a network's `params`, `encoder` and `bottleneck`, and of
    the running `statistics`; it does not look at the cameras.

    Args:
      encoder: The architecture.
      data: Size and statistics of the images.
      token: Before the batch norm: "cls", or the "mean" of the patches'.
      dtype: Of matrix products and activations.
    """
    grid = data.height // encoder.patch_size, data.width // encoder.patch_size

    def encode(state: PyTree, images: Array, cameras: Array) -> Array:
        del cameras
        params: Any = state["params"]
        patches = pixels.normalised_patches(
            images, encoder.patch_size, data.mean, data.std
        )
        tokens = personmae.encode(
            encoder, grid, params["encoder"], patches, dtype=dtype
        ).tokens.astype(jnp.float32)
        feature = tokens[:, 0] if token == "cls" else jnp.mean(tokens[:, 1:], axis=1)
        return normalise(feature, params["bottleneck"]["scale"], state["statistics"])

    return encode
