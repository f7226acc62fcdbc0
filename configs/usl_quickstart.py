"""USL in minutes on a laptop: the small ViT of the quickstart, synthetic people.

Command: python launch/adapt.py --config=configs/usl_quickstart.py
  --config.init.workdir=runs/quickstart --workdir=runs/usl_quickstart
Data: synthetic people whom the quickstart has not seen, six cameras, 128 x 64 pixels. A
  run of finetune_quickstart was trained on them; for UDA from it take others:
  --config.data.synthetic.first_identity=2000.
"""

from personmae_jax.config import EncoderConfig
from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    cfg = UnsupervisedConfig()
    # The quickstart's, for a run from scratch.
    cfg.encoder = EncoderConfig(width=96, depth=4, num_heads=3, patch_size=8)
    cfg.data.layout = "synthetic"
    cfg.data.height, cfg.data.width = 128, 64
    cfg.data.synthetic.first_identity = 1000  # the quickstart's are 0 to 499
    cfg.data.synthetic.identities, cfg.data.synthetic.shots = 120, 2
    cfg.data.synthetic_train = 80  # 960 images
    cfg.augment.padding = 5  # of half the pixels
    # Of a person there are 12 images; a weak encoder finds the fewer of them.
    cfg.cluster.k1, cfg.cluster.k2, cfg.cluster.eps = 12, 3, None
    cfg.cluster.centre_cameras = True  # it tells cameras apart better than people
    cfg.sampling.clusters, cfg.sampling.images = 16, 4
    cfg.optim.optimizer, cfg.optim.base_lr = "adamw", 4e-3
    cfg.optim.layer_decay, cfg.optim.weight_decay = 0.75, 0.05
    # A small network for a few minutes learns too little rather than by heart.
    cfg.augment.erase_probability = cfg.head.drop_path = 0.0
    # The cls token of a masked encoder has learned little, and the mean of all patches
    # is of the background as much as of the person.
    cfg.head.feature = "stripes"
    cfg.train.rounds, cfg.train.steps_per_round = 30, 12
    cfg.log.every_steps = 12
    return cfg
