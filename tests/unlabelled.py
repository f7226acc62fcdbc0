"""Settings and images so small that a test may train on them without labels."""

import jax
import numpy as np
from etils import epath

from personmae_jax import sharding
from personmae_jax.config import EncoderConfig, SyntheticConfig
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.data.records import SyntheticRecords
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.engine.workdir import read_settings
from personmae_jax.unsupervised.data import Unlabelled, open_target
from personmae_jax.unsupervised.program import build
from personmae_jax.unsupervised.run import make_training
from personmae_jax.unsupervised.step import UnsupervisedState

# Of the command: one block on 144 images in 6 cameras, 3 rounds of 4 steps.
SMALL = (
    "--config=configs/usl_quickstart.py",
    *("--config.encoder.width=32", "--config.encoder.depth=1"),
    *("--config.encoder.num_heads=2", "--config.encoder.patch_size=16"),
    *("--config.data.height=64", "--config.data.width=32"),
    *("--config.data.synthetic.identities=16", "--config.data.synthetic_train=12"),
    *("--config.cluster.k1=8", "--config.cluster.k2=3"),
    "--config.cluster.min_samples=2",
    *("--config.sampling.clusters=4", "--config.sampling.images=4"),
    *("--config.train.rounds=3", "--config.train.steps_per_round=4"),
    *("--config.eval.every_rounds=2", "--config.log.every_steps=1"),
)


def tiny_unsupervised() -> UnsupervisedConfig:
    """Two blocks of width 16 on 32 x 16 pixels; 4 x 4 images, 3 rounds of 4 steps."""
    cfg = UnsupervisedConfig()
    cfg.encoder = EncoderConfig(width=16, depth=2, num_heads=2, patch_size=8)
    cfg.data.layout = "synthetic"
    cfg.data.height, cfg.data.width = 32, 16
    cfg.data.synthetic = SyntheticConfig(identities=14, cameras=2, shots=3)
    cfg.data.synthetic_train = 12
    cfg.cluster.k1, cfg.cluster.k2, cfg.cluster.eps = 8, 3, None
    cfg.cluster.min_samples = 2
    cfg.sampling.clusters, cfg.sampling.images = 4, 4
    cfg.augment.padding = 2
    cfg.train.rounds, cfg.train.steps_per_round = 3, 4
    cfg.eval.every_rounds, cfg.eval.batch_size = 2, 16
    return cfg


def run(cfg: UnsupervisedConfig, workdir: str, *data, **options) -> int:
    """As the command trains; arguments of `make_training`."""
    return loop.run(make_training(cfg, workdir, *data, **options), workdir)


def last_state(workdir) -> UnsupervisedState:
    """That of the latest checkpoint, on as many devices as there are."""
    cfg = read_settings(str(workdir))
    target, _ = open_target(cfg)
    program = build(cfg, sharding.make_mesh(cfg.mesh), num_images=len(target))
    with Checkpoints(epath.Path(workdir), keep=1, config={}) as checkpoints:
        last = checkpoints.latest_step()
        return checkpoints.restore(program.abstract_state, last)


def num_split(part) -> int:
    """How many arrays of a part of a state lie on several devices in pieces."""
    return sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(part))


def tiny_target() -> Unlabelled:
    """72 synthetic images in 2 cameras."""
    return open_target(tiny_unsupervised())[0]


def tiny_labels(seed: int = 0) -> np.ndarray:
    """8 clusters and outliers."""
    return np.random.default_rng(seed).integers(-1, 8, 72).astype(np.int32)


def market(root, rename=lambda identity: identity):
    """9 synthetic people in the layout of Market-1501; 6 of them to train on."""
    cfg = tiny_unsupervised()
    cfg.data.synthetic.identities = 9
    people = SyntheticRecords(cfg.data.synthetic)
    for index in range(len(people)):
        identity, camera, shot = index // 6, index % 6 // 3, index % 3
        folder = "bounding_box_train"
        if identity >= 6:
            folder = "query" if (camera, shot) == (0, 0) else "bounding_box_test"
        path = root / folder / f"{rename(identity):04}_c{camera + 1}_{shot}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(people.read(index))
    cfg.data.layout, cfg.data.path = "market1501", str(root)
    return cfg
