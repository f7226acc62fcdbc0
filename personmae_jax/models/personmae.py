"""The whole network behind plain functions; no other model module is imported."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from personmae_jax.config import Config, PredictorConfig, predictor_size
from personmae_jax.models.encoder import Encoded, Encoder
from personmae_jax.models.layers import layer_norm, sample_drop_path_mask
from personmae_jax.models.posembed import position_table
from personmae_jax.models.predictor import Predictor

__all__ = [
    "Encoded",
    "sample_drop_path_mask",
    "encode",
    "init_params",
    "layer_norm",
    "position_table",
    "predict",
]

Params = dict[str, Any]

# What each predictor predicts; its name is that of its parameters.
_PREDICTED = {"pixel_predictor": "pixels", "feature_predictor": "features"}


def encode(
    cfg: Config,
    encoder_params: Params,
    patches: Float[Array, "b v p"],
    visible: Int[Array, "b v"] | None = None,
    *,
    side_info: Float[Array, "b d"] | None = None,
    drop_path_mask: Float[Array, "depth 2 b"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Encoded:
    """Encodes patches of normalised pixels with a student's or a teacher's encoder.

    Args:
      cfg: Names the architecture.
      encoder_params: `params["encoder"]` or the teacher's parameters.
      patches: The patches that may be seen.
      visible: Raster index of each; None where all patches are given in order.
      side_info: To all tokens of an image before the first block.
      drop_path_mask: Of `sample_drop_path_mask`; None: no stochastic depth.
      dtype: Of matrix products and activations.
    """
    return _encoder(cfg, dtype).apply(
        {"params": encoder_params}, patches, visible, side_info, drop_path_mask
    )


def predict(
    cfg: Config,
    params: Params,
    encoded: Encoded,
    geometry: Float[Array, "b 4"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, Float[Array, "b n _"]]:
    """Predicts all patches of RegionB from RegionA's visible tokens.

    Args:
      cfg: Names the architecture.
      params: Of the whole network.
      encoded: RegionA's visible tokens.
      geometry: Where RegionB lies in RegionA, see `regions.relative_geometry`.
      dtype: Of matrix products and activations.

    Returns:
      Float32 predictions: "pixels" (b, n, 3 * patch**2) and, unless
      `cfg.loss.feature_weight` is 0, "features" (b, n, width of the encoder).
    """
    return {
        _PREDICTED[name]: predictor.apply({"params": params[name]}, encoded, geometry)
        for name, predictor in _predictors(cfg, dtype).items()
    }


def init_params(cfg: Config, key: Array) -> Params:
    """Returns the initial float32 parameters: "encoder" and one entry a predictor."""
    keys = jax.random.split(key, 3)
    patches = jnp.zeros((1, cfg.num_patches, 3 * cfg.encoder.patch_size**2))
    encoder = _encoder(cfg, jnp.float32)
    encoded, variables = encoder.init_with_output(keys[0], patches)
    params = {"encoder": variables["params"]}
    geometry = jnp.ones((1, 4))
    for predictor_key, (name, predictor) in zip(
        keys[1:], _predictors(cfg, jnp.float32).items(), strict=False
    ):
        variables = predictor.init(predictor_key, encoded, geometry)
        params[name] = variables["params"]
    return params


def _encoder(cfg: Config, dtype: DTypeLike) -> Encoder:
    return Encoder(
        width=cfg.encoder.width,
        depth=cfg.encoder.depth,
        num_heads=cfg.encoder.num_heads,
        mlp_ratio=cfg.encoder.mlp_ratio,
        grid=cfg.grid,
        learned_positions=cfg.encoder.learned_positions,
        pos_embed_grid=cfg.encoder.pos_embed_grid,
        dtype=dtype,
        remat=cfg.train.remat,
    )


def _predictors(cfg: Config, dtype: DTypeLike) -> dict[str, Predictor]:
    def build(settings: PredictorConfig, outputs: int, head_std: float | None):
        width, num_heads = predictor_size(cfg, settings)
        return Predictor(
            width=width,
            depth=settings.depth,
            num_heads=num_heads,
            memory_blocks=tuple(i % cfg.encoder.depth for i in settings.memory_blocks),
            use_self_attention=settings.use_self_attention,
            outputs=outputs,
            grid=cfg.grid,
            head_std=head_std,
            dtype=dtype,
            remat=cfg.train.remat,
        )

    # 0.001: the loss starts at the variance of the target; Xavier starts it at 1.8.
    pixels = build(cfg.pixel_predictor, 3 * cfg.encoder.patch_size**2, 0.001)
    if not cfg.loss.feature_weight:
        return {"pixel_predictor": pixels}
    features = build(cfg.feature_predictor, cfg.encoder.width, None)
    return {"pixel_predictor": pixels, "feature_predictor": features}
