"""A network, a configuration and a batch so small that a test may train them."""

from typing import Any

import numpy as np
from jaxtyping import Array

from personmae_jax.config import Config, EncoderConfig, PredictorConfig
from personmae_jax.models import personmae


def tiny_config() -> Config:
    """Two blocks of width 16 on a 4 x 2 grid of 4-pixel patches; batches of 8.

    Each loss is in its plainest form; tests of the others switch them on.
    """
    cfg = Config(
        encoder=EncoderConfig(width=16, depth=2, num_heads=2, patch_size=4),
        pixel_predictor=PredictorConfig(
            width=8, depth=1, num_heads=2, memory_blocks=(0, -1)
        ),
        feature_predictor=PredictorConfig(depth=1),
    )
    cfg.loss.feature_blocks, cfg.loss.feature_instance_norm = 1, False
    cfg.loss.cls_weight = 0.0
    cfg.data.source = "synthetic"
    cfg.data.height, cfg.data.width = 16, 8
    cfg.train.batch_size, cfg.train.steps = 8, 20
    return cfg


def init_params(cfg: Config, key: Array) -> dict[str, Any]:
    """The initial parameters of the whole network that the settings name."""
    return personmae.init_params(
        *(cfg.encoder, cfg.predictors, cfg.grid, key),
        has_cls_head=bool(cfg.loss.cls_weight),
    )


def tiny_batch(cfg: Config, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise of the shapes of `Program.abstract_batch`, RegionB beside RegionA."""
    rng = np.random.default_rng(seed)
    b, n = cfg.train.batch_size, cfg.num_patches
    image = (b, cfg.data.height, cfg.data.width, 3)
    visible = rng.permuted(np.tile(np.arange(n), (b, 1)), axis=1)
    geometry = [rng.uniform(-1, 1, (b, 2)), rng.uniform(0.7, 1.4, (b, 2))]
    return {
        "region_a": rng.integers(0, 256, image, np.uint8),
        "region_b": rng.integers(0, 256, image, np.uint8),
        "visible": np.sort(visible[:, cfg.num_hidden :], axis=1).astype(np.int32),
        "geometry": np.concatenate(geometry, axis=1).astype(np.float32),
    }
