"""Settings and people so small that a test may fine-tune on them."""

import dataclasses

import exported
import numpy as np

from personmae_jax.config import EncoderConfig, SyntheticConfig
from personmae_jax.config_finetune import FinetuneConfig
from personmae_jax.reid import init
from personmae_jax.reid.datasets import ReidDataset, synthetic_dataset


def tiny_finetuning() -> FinetuneConfig:
    """Two blocks of width 16 on 32 x 16 pixels; 4 x 4 images a step, 8 steps."""
    cfg = FinetuneConfig()
    cfg.encoder = EncoderConfig(width=16, depth=2, num_heads=2, patch_size=8)
    cfg.data.layout = "synthetic"
    cfg.data.height, cfg.data.width = 32, 16
    cfg.data.synthetic = SyntheticConfig(identities=10, cameras=2, shots=2)
    cfg.data.synthetic_train = 8
    cfg.sampling.identities, cfg.sampling.images = 4, 4
    cfg.augment.padding = 2
    cfg.train.steps = 8
    cfg.eval.every_epochs, cfg.eval.batch_size = 2.0, 16
    return cfg


def tiny_people() -> ReidDataset:
    """8 synthetic people to train on, and the same to be sought across 2 cameras."""
    people = synthetic_dataset(SyntheticConfig(identities=8, cameras=2, shots=2))
    return dataclasses.replace(people, train=np.arange(32))


def start(cfg, source, tmp_path):
    """What fine-tuning would begin with, from a run of `exported.make_run`."""
    params = exported.trained_like(source.encoder)
    exported.make_run(tmp_path / "source", source, {3: (params, params)})
    cfg.init.workdir = str(tmp_path / "source")
    init.settle(cfg, str(tmp_path / "new"))
    return params, *init.read_encoder(cfg)
