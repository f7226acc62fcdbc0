"""USL on a folder of one's own images of people: no label, no test set.

Command: python launch/adapt.py --config=configs/usl_images.py
  --config.init.workdir=RUN --config.data.path=DIR --workdir=OUT
Also: --config.data.camera_folders=True, if each folder right below DIR is a camera.
What it leaves besides the encoder: clusters.csv, which images are likely of one person.
"""

from personmae_jax.config_unsupervised import UnsupervisedConfig


def get_config() -> UnsupervisedConfig:
    cfg = UnsupervisedConfig()
    cfg.data.layout = "images"
    cfg.cluster.eps = None  # no published value fits data that nobody has seen
    return cfg
