"""Promises about clusterings that would teach nothing: refused, and nothing is lost."""

import jax
import numpy as np
import pytest
from unlabelled import run, tiny_unsupervised

from personmae_jax.config_unsupervised import ClusterConfig
from personmae_jax.engine.checkpoint import has_checkpoint
from personmae_jax.errors import RunError
from personmae_jax.reid.features import Extractor
from personmae_jax.unsupervised import clustering
from personmae_jax.unsupervised.clustering import cluster
from personmae_jax.unsupervised.data import open_target


def crowd(sizes: list[int], spread: float = 0.05) -> np.ndarray:
    """Features of so many images of each of some people who are easily told apart."""
    rng = np.random.default_rng(0)
    people = np.repeat(np.eye(16)[: len(sizes)], sizes, axis=0)
    return (people + spread * rng.normal(size=people.shape)).astype(np.float32)


SETTINGS = ClusterConfig(k1=4, k2=2, eps=0.6, min_samples=2)


def test_nine_tenths_of_the_images_in_one_cluster_are_a_collapse(monkeypatch):
    labels = np.array([0] * 91 + [1] * 9, np.int32)
    monkeypatch.setattr(clustering, "dbscan", lambda *_: labels)
    features = crowd([91, 9])
    with pytest.raises(RunError, match=r"91 of 100 images are in one.* eps: 0.3 2, "):
        cluster(features, SETTINGS)
    labels[90] = 1
    assert cluster(features, SETTINGS).count == 2


def test_clusters_that_all_follow_cameras_are_a_collapse():
    features = crowd([10, 10, 10])
    cameras = np.repeat([0, 1, 2], 10)
    with pytest.raises(RunError, match=r"each of \d clusters has images of one camera"):
        cluster(features, SETTINGS, cameras)
    cluster(features, SETTINGS)  # as with proxies of cameras
    cluster(features, SETTINGS, np.zeros(30, int))
    cluster(features, SETTINGS, np.arange(30) % 2)


def test_the_way_out_is_no_setting_that_is_on_already():
    for eps, is_said in ((0.05, True), (None, False)):
        with pytest.raises(RunError, match="start in another --workdir") as caught:
            cluster(
                crowd([60], 0.5), ClusterConfig(k1=30, k2=6, eps=eps, min_samples=20)
            )
        assert ("eps=None" in str(caught.value)) == is_said


def settings():
    cfg = tiny_unsupervised()  # three rounds of four steps
    cfg.log.every_steps, cfg.eval.every_rounds = 1, 0
    return cfg


def train(cfg, workdir) -> int:
    return run(cfg, str(workdir), open_target(cfg)[0], None)


def test_a_collapse_at_the_start_leaves_no_checkpoint(tmp_path):
    cfg = settings()
    cfg.cluster.eps, cfg.cluster.k1 = 0.8, 60
    with pytest.raises(RunError, match="round 0: 72 of 72 images are in one cluster"):
        train(cfg, tmp_path)
    assert not has_checkpoint(tmp_path)


def test_an_image_without_a_usable_feature_is_named(tmp_path, monkeypatch):
    target = open_target(settings())[0]
    real = Extractor.__call__

    def spoilt(*given):
        features = np.array(jax.device_get(real(*given)))
        features[5], features[9] = 0, np.nan
        return features

    monkeypatch.setattr(Extractor, "__call__", spoilt)
    name = target.records.name(5)
    with pytest.raises(RunError, match=f"round 0: features of 2 of 72 .* of {name}"):
        train(settings(), tmp_path)
