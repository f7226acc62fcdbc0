"""Fine-tuning of a ViT-B on Occluded-Duke, by the recipe of Market-1501.

Sources: TransReID's and PersonViT's settings for Occluded-Duke differ from their own
for Market-1501 in the data alone (configs/OCC_Duke and configs/occ_duke there), and so
does this from `finetune_market1501.py`.

Command: python launch/finetune.py --config=configs/finetune_occluded_duke.py
  --config.init.workdir=RUN --config.data.path=Occluded_Duke --workdir=OUT
Also: a run on Market-1501 that is scored by Occluded-REID, which has no images to train
  on: finetune_market1501.py with --config.eval.layout=occluded_whole
  --config.eval.path=Occluded_REID.
Data: Occluded-Duke, which is laid out as Market-1501: query/, bounding_box_test/ and
  bounding_box_train/, which its authors' script makes of DukeMTMC-reID.
Published mAP of a ViT-B at 256 x 128 pixels: 53.8 TransReID's baseline, 59.5 TransReID,
  64.3 PASS, 69.5 PersonMAE, 72.2 PersonViT.
Hardware: TPU or GPU; nobody has run it yet, so no time and no number of ours stand
here.
"""

from personmae_jax.config_finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    return FinetuneConfig()  # its layout is market1501
