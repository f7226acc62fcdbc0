"""PersonMAE in minutes on a laptop: a small ViT learns synthetic pedestrians.

Command: make pretrain, or
  python launch/pretrain.py --config=configs/quickstart.py --workdir=runs/quickstart
Data: the synthetic pedestrians, 128 x 64 pixels; nothing to download.
"""

from personmae_jax.config import Config, EncoderConfig


def get_config() -> Config:
    cfg = Config()
    # Patches of 8 pixels: 16 x 8 of them, as ViT-B has at 256 x 128.
    cfg.encoder = EncoderConfig(width=96, depth=4, num_heads=3, patch_size=8)
    for predictor in (cfg.pixel_predictor, cfg.feature_predictor):
        predictor.width = predictor.num_heads = None  # the encoder's
        predictor.depth = 1
        predictor.memory_blocks = (1, -1)  # of four
    cfg.loss.feature_blocks = 2  # the upper half, as in the default
    cfg.loss.cls_weight = 0.0  # frozen it costs in runs this short; docs/method.md
    cfg.data.source = "synthetic"
    cfg.data.height, cfg.data.width = 128, 64
    cfg.data.synthetic.identities, cfg.data.synthetic.cameras = 500, 3
    cfg.train.batch_size, cfg.train.steps = 64, 300
    # Those of benchmarks/ablations.py; not searched on these people.
    cfg.optim.lr, cfg.optim.clip_norm = 1e-3, 1.0
    cfg.log.every_steps = 1
    cfg.log.pictures_every_steps = 150
    cfg.checkpoint.every_steps = 150
    cfg.eval.every_steps = 150
    return cfg
