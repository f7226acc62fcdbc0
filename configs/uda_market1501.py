"""UDA from MSMT17 to Market-1501: USL that starts from a run fine-tuned on MSMT17.

Source: damo-cv/TransReID-SSL, cluster-contrast-reid/market_uda.sh.

Commands: python launch/finetune.py --config=configs/finetune_market1501.py
  --config.data.layout=msmt17 --config.data.path=MSMT17_V1 --config.init.workdir=RUN
  --workdir=SOURCE
  python launch/adapt.py --config=configs/uda_market1501.py
  --config.init.workdir=SOURCE --config.data.path=Market-1501 --workdir=OUT
The row of step 0 is direct transfer. Parity: TransReID-SSL's ViT-S has 89.4 mAP and
  95.4 rank-1; nobody has run it here.
"""

from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    return UnsupervisedConfig()
