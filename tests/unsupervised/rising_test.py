"""Right pseudo labels find people, and those shuffled among them do not."""

import numpy as np
import pytest
from etils import epath
from PIL import Image
from unlabelled import run, tiny_unsupervised

from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.metrics import read_rows
from personmae_jax.unsupervised.clustering import OUTLIER
from personmae_jax.unsupervised.data import open_target
from personmae_jax.unsupervised.rounds import PseudoLabels

SHOTS = 6  # of a person in each of two cameras


class ShuffledLabels(PseudoLabels):
    """As many clusters, of as many images each of every camera, of anybody.

    Shuffled across cameras they would teach that a camera tells nothing, which by
    itself lets the scores rise.
    """

    def make_labels(self, round_, features):
        labels, numbers = super().make_labels(round_, features)
        rng, labels = np.random.default_rng(round_), labels.copy()
        for camera in np.unique(self._target.cameras):
            moved = (labels != OUTLIER) & (self._target.cameras == camera)
            labels[moved] = rng.permutation(labels[moved])
        return labels, numbers


@pytest.fixture(scope="module")
def coloured_people(tmp_path_factory) -> str:
    """60 people to train on and 20 others, in two colours each; camera 2 is darker."""
    root, rng = tmp_path_factory.mktemp("coloured"), np.random.default_rng(0)
    for identity in range(80):
        folder = root / ("train" if identity < 60 else "val") / f"{identity:04}"
        folder.mkdir(parents=True)
        upper, lower = rng.uniform(40, 215, (2, 3))
        for camera, gain in ((1, 1.0), (2, 0.85)):
            for shot in range(SHOTS):
                image = np.empty((32, 16, 3))
                image[:16], image[16:] = upper, lower
                image = gain * np.roll(image, rng.integers(-3, 4), axis=0)
                image += rng.normal(0, 10, image.shape)
                pixels = np.clip(image, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{camera}_{shot}.png")
    return str(root)


def settings(path: str) -> UnsupervisedConfig:
    cfg = tiny_unsupervised()
    cfg.encoder.width = 32
    cfg.data.layout, cfg.data.path = "id_folders", path
    cfg.cluster.k1, cfg.cluster.min_samples = 2 * SHOTS, 4
    cfg.cluster.eps, cfg.cluster.centre_cameras = 0.5, True
    cfg.sampling.clusters = 16
    cfg.head.feature, cfg.head.drop_path = "mean", 0.0
    cfg.augment.erase_probability = 0.0
    cfg.optim.optimizer, cfg.optim.base_lr = "adamw", 0.016
    cfg.train.rounds, cfg.train.steps_per_round = 4, 15
    cfg.eval.every_rounds = 4
    return cfg


def train(
    cfg: UnsupervisedConfig, workdir, labels: type[PseudoLabels] = PseudoLabels
) -> tuple[list, list]:
    """Returns mAP at the start and the end, and the ARI of the clusters by round."""
    run(cfg, str(workdir), *open_target(cfg), labels=labels)
    rows = read_rows(epath.Path(workdir))
    mean_ap = [row["retrieval_mAP"] for row in rows if "retrieval_mAP" in row]
    return mean_ap, [row["known_ari"] for row in rows if "known_ari" in row]


def test_clusters_and_scores_rise_and_end_above_those_of_shuffled_labels(
    tmp_path, coloured_people
):
    cfg = settings(coloured_people)
    (start, end), aris = train(cfg, tmp_path / "run")
    _, control = train(cfg, tmp_path / "control", ShuffledLabels)[0]
    assert end > start + 0.15
    assert end > control + 0.1
    assert aris[-1] > aris[0] + 0.05


def test_with_each_camera_s_mean_taken_off_clusters_follow_people(
    tmp_path, coloured_people
):
    cfg = settings(coloured_people)
    cfg.train.rounds, cfg.train.steps_per_round = 1, 1
    aris = []
    for cfg.cluster.centre_cameras in (False, True):
        aris += train(cfg, tmp_path / str(cfg.cluster.centre_cameras))[1]
    assert aris[1] > aris[0] + 0.1
