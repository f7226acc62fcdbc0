"""Encoders that look trained, runs that hold them, and what they are to be in torch."""

import dataclasses

import numpy as np
from etils import epath

from personmae_jax.config import Config, EncoderConfig
from personmae_jax.config_json import config_to_json
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.pytorch import weights

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12)}


def vit_config(width: int, depth: int, num_heads: int, **encoder) -> Config:
    """A ViT on 256 x 128 pixels, patch 16: a 16 x 8 grid."""
    return Config(
        encoder=EncoderConfig(width=width, depth=depth, num_heads=num_heads, **encoder)
    )


def small_config() -> Config:
    """Three blocks of 4 heads of 8, on 8 x 4 patches of 4 pixels."""
    cfg = vit_config(32, 3, 4, patch_size=4)
    cfg.data.height, cfg.data.width = 32, 16
    return cfg


def trained_like(encoder: EncoderConfig, seed: int = 0) -> dict:
    """Parameters none of which is 0 or 1, so that every mistake shows."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in weights.tensor_shapes(encoder, (1, 1)).items():
        numbers = rng.standard_normal(shape, np.float32)
        if name == "cls_token":
            numbers *= 0.02
        elif name.endswith("bias"):
            numbers *= 0.2
        elif "norm" in name:
            numbers = 1 + 0.2 * numbers
        else:
            numbers *= 1.5 / np.sqrt(np.prod(shape[1:]))
        tensors[name] = numbers.astype(np.float32)
    del tensors["pos_embed"]
    return weights.encoder_from_torch(tensors)


def make_run(folder, cfg: Config, encoders: dict[int, tuple[dict, dict]]) -> None:
    """Leaves in `folder` what a run leaves: (student, teacher) by step."""
    folder = epath.Path(folder)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config_to_json(cfg))
    about = dataclasses.asdict(cfg)
    with Checkpoints(folder, keep=len(encoders), config=about) as checkpoints:
        for step, (student, teacher) in encoders.items():
            state = {"params": {"encoder": student}, "teacher_params": teacher}
            checkpoints.save(step, state)
