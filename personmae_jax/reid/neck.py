"""Features after the batch norm of a run that was fine-tuned or adapted."""

from typing import Any

from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from personmae_jax.config import EncoderConfig, ImageConfig, grid_of
from personmae_jax.models.batch_norm import normalise
from personmae_jax.reid.features import Encode, encode_tokens, pool


def make_encode(
    encoder: EncoderConfig, data: ImageConfig, token: str, dtype: DTypeLike
) -> Encode:
    """Returns (params, images, cameras) -> features after the batch norm.

    Its `params` are a dict of a network's `params`, `encoder` and `bottleneck`, and of
    the running `statistics`; it does not look at the cameras. `token`
    is what the batch norm takes: "cls", "mean" or "stripes" of `features.pool`.
    """

    def encode(state: PyTree, images: Array, cameras: Array) -> Array:
        del cameras
        params: Any = state["params"]
        tokens = encode_tokens(encoder, data, params["encoder"], images, dtype=dtype)
        feature = pool(tokens, token, grid_of(encoder, data))
        scale = params["bottleneck"]["scale"]
        return normalise(feature, scale, state["statistics"])

    return encode
