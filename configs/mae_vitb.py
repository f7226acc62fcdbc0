"""Plain MAE, ViT-B on LUPerson: what PersonMAE has to beat at the same cost of images.

One region, three quarters of its patches hidden at random, the loss on hidden patches
alone, no teacher's features. Encoder, crops, data and optimizer are those of
`configs/vitb.py`, so that a difference is the method's. The decoder has MAE's 8 blocks,
512 wide with 16 heads, but is this project's: its queries are the mask tokens of all
patches, and they read the encoder's tokens by cross-attention.

Source: MAE, arXiv 2111.06377; `personmae_jax/config.py` says where the rest comes from.

Command: python launch/pretrain.py --config=configs/mae_vitb.py
  --config.data.path=DIR --workdir=WORKDIR
Data: LUPerson, 4.18 M crops without labels: 306,000 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config import Config, PredictorConfig


def get_config() -> Config:
    cfg = Config()
    cfg.regions.same = True
    cfg.masks.kind, cfg.masks.ratio = "random", 0.75
    cfg.pixel_predictor = PredictorConfig(width=512, depth=8, num_heads=16)
    cfg.loss.feature_weight = cfg.loss.cls_weight = 0.0
    cfg.loss.visible_pixel_weight = 0.0
    return cfg
