"""Promises of what a round leaves for a person to read."""

import numpy as np
import pytest
from etils import epath
from unlabelled import tiny_labels, tiny_target

from personmae_jax.errors import RunError
from personmae_jax.unsupervised.clustering import Clusters
from personmae_jax.unsupervised.report import write_report


def test_a_disk_that_takes_no_clusters_is_told_in_a_sentence(tmp_path):
    (tmp_path / "clusters.csv" / "in the way").mkdir(parents=True)
    features = np.random.default_rng(0).standard_normal((72, 4)).astype(np.float32)
    clusters = Clusters(labels=tiny_labels(), eps=0.5)
    with pytest.raises(RunError, match="the clusters in .* cannot be written"):
        write_report(epath.Path(tmp_path), tiny_target(), clusters, features, "0.png")
