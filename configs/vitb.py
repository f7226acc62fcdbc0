"""PersonMAE ViT-B on LUPerson: 300 epochs, batch 4096, 256 x 128 pixels.

Source: arXiv 2311.04496, whose encoder is ViT-B;
`personmae_jax/config.py` says where each setting comes from.

Command: python launch/pretrain.py --config=configs/vitb.py
  --config.data.path=DIR --workdir=WORKDIR
Data: LUPerson, 4.18 M crops without labels: 306,000 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config import Config


def get_config() -> Config:
    return Config()
