"""USL on Market-1501: 50 rounds of clustering and 200 steps of 32 x 8 images each.

Sources: damo-cv/TransReID-SSL, cluster-contrast-reid/market_usl.sh;
`personmae_jax/config_unsupervised.py` says where each setting comes from.

Command: python launch/adapt.py --config=configs/usl_market1501.py
  --config.init.workdir=RUN --config.data.path=Market-1501 --workdir=OUT
Parity: --config.init.torch_weights=vit_small_cfs_lup.pth, TransReID-SSL's ViT-S, with
  --config.init.mean=0.5,0.5,0.5 --config.init.std=0.5,0.5,0.5 as its script has them,
  should come near its 88.2 mAP and 94.2 rank-1, the best of its tests; nobody has run
  that.
Data: 12,936 images; their identities are not read.
Hardware: TPU or GPU; nobody has run it in full yet, so no time and no number stand
here.
"""

from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    return UnsupervisedConfig()
