"""PersonMAE ViT-L on LUPerson: 300 epochs, batch 4096, 256 x 128 pixels.

Source: arXiv 2311.04496; the size is our choice, after MAE;
all else is as in `configs/vitb.py`.

Command: python launch/pretrain.py --config=configs/vitl.py
  --config.data.path=DIR --workdir=WORKDIR
Data: LUPerson, 4.18 M crops without labels: 306,000 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config import Config, EncoderConfig


def get_config() -> Config:
    cfg = Config()
    cfg.encoder = EncoderConfig(width=1024, depth=24, num_heads=16, patch_size=16)
    cfg.feature_predictor.memory_blocks = (7, 15, -1)  # of the 24
    cfg.loss.feature_blocks = 12  # the upper half
    # 63 patches stay, 64 tokens with cls: a TPU pads them to a multiple of 8.
    cfg.masks.ratio = 65 / 128
    return cfg
