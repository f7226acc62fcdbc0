"""PersonMAE in minutes on a laptop: a small ViT learns synthetic pedestrians.

Command: make pretrain, or
  python launch/pretrain.py --config=configs/quickstart.py --workdir=runs/quickstart
Data: the synthetic pedestrians, 128 x 64 pixels; nothing to download.
"""

from personmae_jax.config import Config, EncoderConfig, PredictorConfig


def get_config() -> Config:
    cfg = Config()
    cfg.encoder = EncoderConfig(width=128, depth=4, num_heads=2)
    # What this config was measured with; see docs/results.md.
    cfg.pixel_predictor = PredictorConfig(memory_blocks=(0, -1))
    cfg.feature_predictor = PredictorConfig()
    cfg.regions.min_area, cfg.regions.nested = 0.5, 0.0
    cfg.loss.feature_blocks, cfg.loss.feature_instance_norm = 1, False
    cfg.loss.cls_weight = 0.0
    cfg.data.source = "synthetic"
    cfg.data.height, cfg.data.width = 128, 64
    cfg.data.synthetic.identities, cfg.data.synthetic.cameras = 500, 3
    cfg.train.batch_size = 32
    cfg.train.steps = 1400
    # Drawn features are soon predicted; this leaves more of the network to the pixels.
    cfg.loss.feature_weight = 0.3
    cfg.optim.base_lr = 8e-3
    cfg.log.every_steps = 1
    cfg.log.pictures_every_steps = 350
    cfg.checkpoint.every_steps = 350
    cfg.eval.every_steps = 350
    # What minutes teach is not seen otherwise; docs/method.md.
    cfg.eval.feature, cfg.eval.centre_cameras = "patches", True
    return cfg
