"""The whole network behind plain functions: other folders import only it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from personmae_jax.config import EncoderConfig, PredictorConfig, predictor_size
from personmae_jax.models.encoder import Encoded, Encoder
from personmae_jax.models.layers import Dense, layer_norm, sample_drop_path_mask
from personmae_jax.models.posembed import position_table
from personmae_jax.models.predictor import Predictor

__all__ = [
    "Encoded",
    "sample_drop_path_mask",
    "encode",
    "init_encoder",
    "init_params",
    "layer_norm",
    "position_table",
    "predict",
]

Params = dict[str, Any]
Grid = tuple[int, int]  # rows and columns of patches
Predictors = Mapping[str, PredictorConfig]  # by the names of their parameters

# What each predictor predicts; its name is that of its parameters.
_PREDICTED = {"pixel_predictor": "pixels", "feature_predictor": "features"}


def encode(
    encoder: EncoderConfig,
    grid: Grid,
    params: Params,
    patches: Float[Array, "b v p"],
    visible: Int[Array, "b v"] | None = None,
    *,
    side_info: Float[Array, "b d"] | None = None,
    drop_path_mask: Float[Array, "depth 2 b"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> Encoded:
    """Encodes patches of normalised pixels with a student's or a teacher's encoder.

    Args:
      encoder: The architecture.
      grid: Of a whole image, also where only some of its patches are given.
      params: `params["encoder"]` or the teacher's parameters.
      patches: The patches that may be seen.
      visible: Raster index of each; None where all patches are given in order.
      side_info: To all tokens of an image before the first block.
      drop_path_mask: Of `sample_drop_path_mask`; None: no stochastic depth.
      dtype: Of matrix products and activations.
      remat: What the backward pass computes again; see config.train.remat.
    """
    return _encoder(encoder, grid, dtype, remat).apply(
        {"params": params}, patches, visible, side_info, drop_path_mask
    )


def predict(
    encoder: EncoderConfig,
    predictors: Predictors,
    grid: Grid,
    params: Params,
    encoded: Encoded,
    geometry: Float[Array, "b 4"],
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str = "none",
) -> dict[str, Float[Array, "b *n _"]]:
    """Predicts all patches of RegionB from RegionA's visible tokens.

    Args:
      encoder: The architecture of what has encoded them.
      predictors: The heads, as `Config.predictors` gives them.
      grid: Of RegionB.
      params: Of the whole network.
      encoded: RegionA's visible tokens.
      geometry: Where RegionB lies in RegionA, see `regions.relative_geometry`.
      dtype: Of matrix products and activations.
      remat: As of `encode`.

    Returns:
      Float32 predictions: "pixels" (b, n, 3 * patch**2) and "features" (b, n, width
      of the encoder), each if there is a predictor of it, and of the features' mean
      "cls" (b, width of the encoder), if `params` has the head.
    """
    predicted = {
        _PREDICTED[name]: predictor.apply({"params": params[name]}, encoded, geometry)
        for name, predictor in _predictors(
            encoder, predictors, grid, dtype, remat
        ).items()
    }
    if "cls_head" in params:
        head, cls = _cls_head(encoder, dtype), encoded.tokens[:, 0]
        cls = head.apply({"params": params["cls_head"]}, cls)
        predicted["cls"] = cls.astype(jnp.float32)
    return predicted


def init_encoder(encoder: EncoderConfig, grid: Grid, key: Array) -> Params:
    """Returns the initial float32 parameters of an encoder alone."""
    return _init_encoder(encoder, grid, key)[1]


def init_params(
    encoder: EncoderConfig,
    predictors: Predictors,
    grid: Grid,
    key: Array,
    *,
    has_cls_head: bool = False,
) -> Params:
    """Returns the initial float32 parameters: "encoder" and one entry a predictor.

    With `has_cls_head` there is "cls_head" too, a linear map of the cls token.
    """
    encoded, encoder_params = _init_encoder(encoder, grid, key)
    params, geometry = {"encoder": encoder_params}, jnp.ones((1, 4))
    built = _predictors(encoder, predictors, grid, jnp.float32, "none")
    for predictor_key, (name, predictor) in zip(
        _keys(key)[1:], built.items(), strict=False
    ):
        variables = predictor.init(predictor_key, encoded, geometry)
        params[name] = variables["params"]
    if has_cls_head:
        head = _cls_head(encoder, jnp.float32)
        variables = head.init(jax.random.fold_in(key, 1), encoded.tokens[:, 0])
        params["cls_head"] = variables["params"]
    return params


def _cls_head(encoder: EncoderConfig, dtype: DTypeLike) -> Dense:
    return Dense(encoder.width, dtype=dtype)


def _keys(key: Array) -> Array:
    """Of the encoder and of two predictors: one more head changes no other's key."""
    return jax.random.split(key, 3)


def _init_encoder(
    encoder: EncoderConfig, grid: Grid, key: Array
) -> tuple[Encoded, Params]:
    patches = jnp.zeros((1, grid[0] * grid[1], 3 * encoder.patch_size**2))
    module = _encoder(encoder, grid, jnp.float32, "none")
    encoded, variables = module.init_with_output(_keys(key)[0], patches)
    return encoded, variables["params"]


def _encoder(
    encoder: EncoderConfig, grid: Grid, dtype: DTypeLike, remat: str
) -> Encoder:
    settings = dataclasses.asdict(encoder)
    del settings["patch_size"]  # it is given patches
    return Encoder(**settings, grid=grid, dtype=dtype, remat=remat)


def _predictors(
    encoder: EncoderConfig,
    predictors: Predictors,
    grid: Grid,
    dtype: DTypeLike,
    remat: str,
) -> dict[str, Predictor]:
    heads: dict[str, dict[str, Any]] = {
        "pixel_predictor": {
            "outputs": 3 * encoder.patch_size**2,
            # The loss starts at the variance of the target; Xavier starts it at 1.8.
            "head_init": nn.initializers.normal(0.001),
        },
        "feature_predictor": {"outputs": encoder.width},
    }

    def build(name: str, settings: PredictorConfig) -> Predictor:
        width, num_heads = predictor_size(encoder, settings)
        return Predictor(
            width=width,
            depth=settings.depth,
            num_heads=num_heads,
            memory_blocks=tuple(i % encoder.depth for i in settings.memory_blocks),
            use_self_attention=settings.use_self_attention,
            grid=grid,
            dtype=dtype,
            remat=remat,
            **heads[name],
        )

    return {name: build(name, cfg) for name, cfg in predictors.items()}
