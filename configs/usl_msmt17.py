"""USL on MSMT17: as on Market-1501, but neighbours may be farther apart.

Source: damo-cv/TransReID-SSL, cluster-contrast-reid/msmt_usl.sh.

Command: python launch/adapt.py --config=configs/usl_msmt17.py
  --config.init.workdir=RUN --config.data.path=MSMT17_V1 --workdir=OUT
Also: --config.memory.camera_proxies=True; with proxies TMGF reports 58.2 mAP where
  TransReID-SSL without them has 50.6 (both ViT-S+ICS; TMGF at 384 x 128 pixels).
Parity: TransReID-SSL's ViT-S has 40.9 mAP and 66.4 rank-1; nobody has run it here.
Data: 32,621 images, val among them; their identities are not read.
"""

from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    cfg = UnsupervisedConfig()
    cfg.data.layout = "msmt17"
    cfg.cluster.eps = 0.7
    return cfg
