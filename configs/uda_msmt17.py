"""UDA from Market-1501 to MSMT17: USL that starts from a run fine-tuned on Market-1501.

Source: damo-cv/TransReID-SSL, cluster-contrast-reid/msmt_uda.sh.

Commands: python launch/finetune.py --config=configs/finetune_market1501.py
  --config.data.path=Market-1501 --config.init.workdir=RUN --workdir=SOURCE
  python launch/adapt.py --config=configs/uda_msmt17.py
  --config.init.workdir=SOURCE --config.data.path=MSMT17_V1 --workdir=OUT
The row of step 0 is direct transfer. Parity: TransReID-SSL's ViT-S has 47.4 mAP and
  70.8 rank-1; nobody has run it here.
"""

from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    cfg = UnsupervisedConfig()
    cfg.data.layout = "msmt17"
    cfg.cluster.eps = 0.7
    return cfg
