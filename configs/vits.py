"""PersonMAE ViT-S on LUPerson: 300 epochs, batch 4096, 256 x 128 pixels.

Source: arXiv 2311.04496; the size is our choice, after TransReID-SSL and HAP;
all else is as in `configs/vitb.py`.

Command: python launch/pretrain.py --config=configs/vits.py
  --config.data.path=DIR --workdir=WORKDIR
Data: LUPerson, 4.18 M crops without labels: 306,000 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config import Config, EncoderConfig


def get_config() -> Config:
    cfg = Config()
    cfg.encoder = EncoderConfig(width=384, depth=12, num_heads=6, patch_size=16)
    # 63 patches stay, 64 tokens with cls: a TPU pads them to a multiple of 8.
    cfg.masks.ratio = 65 / 128
    return cfg
