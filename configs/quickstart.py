"""PersonMAE in minutes on a laptop: a small ViT learns drawn pedestrians.

Command: make pretrain, or
  python launch/pretrain.py --config=configs/quickstart.py --workdir=runs/quickstart
Data: the synthetic pedestrians, 128 x 64 pixels; nothing to download.
"""

from personmae_jax.config import Config, EncoderConfig


def get_config() -> Config:
    cfg = Config()
    cfg.encoder = EncoderConfig(width=192, depth=6, num_heads=3)
    cfg.pixel_predictor.width, cfg.pixel_predictor.num_heads = 192, 3
    cfg.data.source = "synthetic"
    cfg.data.height, cfg.data.width = 128, 64
    cfg.train.batch_size = 64
    cfg.train.steps = 500
    cfg.optim.base_lr = 2e-3
    cfg.log.every_steps = 1
    cfg.log.pictures_every_steps = 100
    cfg.checkpoint.every_steps = 100
    return cfg
