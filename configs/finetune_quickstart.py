"""Fine-tuning in minutes on a laptop: the quickstart's small ViT, synthetic people.

Command: make finetune (from runs/quickstart, and from scratch beside it), or
  python launch/finetune.py --config=configs/finetune_quickstart.py
  --config.init.workdir=runs/quickstart --workdir=runs/quickstart_finetuned
Data: synthetic people that the quickstart has not seen, 128 x 64 pixels; for a folder
  of your own add --config.data.layout=id_folders --config.data.path=DIR.
"""

from personmae_jax.config import EncoderConfig
from personmae_jax.config_finetune import FinetuneConfig


def get_config() -> FinetuneConfig:
    cfg = FinetuneConfig()
    # The quickstart's, for a run from scratch.
    cfg.encoder = EncoderConfig(width=96, depth=4, num_heads=3, patch_size=8)
    cfg.data.layout = "synthetic"
    cfg.data.height, cfg.data.width = 128, 64
    cfg.data.synthetic.first_identity = 1000  # the quickstart's are 0 to 499
    cfg.data.synthetic.identities, cfg.data.synthetic.cameras = 300, 3
    cfg.data.synthetic_train = 200
    cfg.augment.padding = 5  # of half the pixels
    # A small network for a few minutes learns too little rather than by heart.
    cfg.augment.erase_probability = cfg.head.drop_path = 0.0
    cfg.optim.base_lr, cfg.optim.layer_decay = 2e-3, 0.75
    cfg.train.epochs = 4.0  # 150 steps of 64 images
    cfg.eval.every_epochs = 2.0
    cfg.log.every_steps = 5
    return cfg
