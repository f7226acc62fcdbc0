"""Fine-tuning of a ViT-B on Market-1501: 256 x 128 pixels, 100 epochs of 16 x 4 images.

Sources: TransReID, TransReID-SSL, HAP; `personmae_jax/config_finetune.py` says
where each setting comes from.

Command: python launch/finetune.py --config=configs/finetune_market1501.py
  --config.init.workdir=RUN --config.data.path=Market-1501 --workdir=OUT
Also: --config.init.torch_weights=FILE, or neither, from scratch; 384 x 128 pixels with
  --config.data.height=384; MSMT17 with --config.data.layout=msmt17.
Data: Market-1501, 12,936 images of 751 people to train on: 20,212 steps.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config_finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    return FinetuneConfig()
