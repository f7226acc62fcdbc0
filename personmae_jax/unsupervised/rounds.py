"""Pseudo labels, made anew every round: features -> distances -> DBSCAN -> memory.

The labels of a round are a function of the settings, the images and the state before
it; process 0 makes them, and the others take its answer, whatever their processors.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jaxtyping import Int32

from personmae_jax import sharding
from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.engine.program import Program
from personmae_jax.engine.training import RoundError
from personmae_jax.errors import RunError
from personmae_jax.reid.features import (
    Extractor,
    Features,
    camera_centred,
    make_neck_encode,
)
from personmae_jax.sharding import matmul_dtype
from personmae_jax.unsupervised import clustering, memory
from personmae_jax.unsupervised.clustering import OUTLIER, Clusters
from personmae_jax.unsupervised.data import Unlabelled
from personmae_jax.unsupervised.sampling import ClusterBatches
from personmae_jax.unsupervised.step import UnsupervisedState

Labels = Int32[np.ndarray, " n"]
# (round, clusters, features) -> more numbers for the round's row; on process 0.
Show = Callable[[int, Clusters, Features], dict[str, int | float]]


class PseudoLabels:
    """`engine.training.Rounds`: a clustering before every `train.steps_per_round`."""

    def __init__(
        self,
        cfg: UnsupervisedConfig,
        program: Program[UnsupervisedConfig],
        target: Unlabelled,
        show: Show = lambda *_: {},
    ):
        """Compiles nothing yet; `show` will be told of every clustering."""
        self._cfg, self._program, self._target = cfg, program, target
        self._show = show
        dtype = matmul_dtype(cfg.train.matmul_dtype, program.mesh)
        # Also for scores, which are by the same feature: it is compiled once.
        self.extract = Extractor(
            make_neck_encode(cfg.encoder, cfg.data, cfg.head.feature, dtype),
            *(cfg.data, program.mesh, cfg.eval.batch_size),
        )
        self._whole = jax.jit(
            lambda x: x, out_shardings=sharding.replicated(program.mesh)
        )
        self._told: set[str] = set()

    def begins(self, step: int) -> bool:
        """Whether a round begins before `step`, which is 1 or more."""
        return (step - 1) % self._cfg.train.steps_per_round == 0

    def open(
        self, step: int, state: UnsupervisedState
    ) -> tuple[UnsupervisedState, ClusterBatches, dict[str, int | float]]:
        """Clusters if a round begins before `step`; returns what it trains on.

        Raises:
          RoundError: The clustering is a collapse.
          RunError: An image cannot be used.
        """
        round_, numbers = (step - 1) // self._cfg.train.steps_per_round, {}
        labels = np.asarray(jax.device_get(self._whole(state.labels)))
        if self.begins(step):
            labels, features, numbers = self._cluster(round_, state, labels)
            rows, clusters, cameras = self._rows(labels)
            found = memory.centroids(features, rows, clusters, cameras)
            state = self._with_labels(state, found, labels)
        batches = ClusterBatches(
            *(self._target, self._cfg, labels, self._rows(labels)[0], round_),
            host=jax.process_index(),
            num_hosts=jax.process_count(),
        )
        return state, batches, numbers

    def make_labels(
        self, round_: int, features: Features
    ) -> tuple[Labels, dict[str, int | float]]:
        """Returns the cluster of every image or OUTLIER, and numbers for the row."""
        cfg, cameras = self._cfg.cluster, self._target.cameras
        if cfg.centre_cameras:
            features = camera_centred(features, cameras)
        is_usable = np.isfinite(features).all(axis=1) & features.any(axis=1)
        if not is_usable.all():
            first = self._target.records.name(int(np.argmin(is_usable)))
            raise RunError(
                f"features of {np.count_nonzero(~is_usable):,} of {len(features):,} "
                f"images are zero or not finite, e.g. that of {first}; take these out "
                "of the data set if they are few, else the network has collapsed"
            )
        # A memory of camera proxies draws the cameras of a cluster together.
        is_split = self._cfg.memory.camera_proxies
        clusters = clustering.cluster(features, cfg, None if is_split else cameras)
        doubts = clustering.doubts(clusters, cameras, self._cfg.sampling.clusters)
        for kind in doubts.keys() - self._told:  # each is said once
            logging.warning("Round %d: %s", round_, doubts[kind])
        self._told |= doubts.keys()
        numbers = {
            "eps": clusters.eps,
            "clusters": clusters.count,
            "outliers": clusters.outliers,
            "largest_cluster": int(clusters.sizes.max()),
            "clusters_across_cameras": clustering.num_across_cameras(clusters, cameras),
        }
        numbers |= self._show(round_, clusters, features)
        return clusters.labels, numbers

    def _rows(
        self, labels: Labels
    ) -> tuple[Labels, Int32[np.ndarray, " _r"], Int32[np.ndarray, " _r"]]:
        """The memory's row of every image; the cluster and camera of every row."""
        if not self._cfg.memory.camera_proxies:
            clusters = np.arange(labels.max() + 1, dtype=np.int32)
            return labels, clusters, np.zeros_like(clusters)
        rows, clusters = clustering.camera_proxies(labels, self._target.cameras)
        first = np.unique(rows[rows != OUTLIER], return_index=True)[1]
        return rows, clusters, self._target.cameras[rows != OUTLIER][first]

    def _cluster(
        self, round_: int, state: UnsupervisedState, before: Labels
    ) -> tuple[Labels, Features, dict[str, int | float]]:
        began = time.monotonic()
        params = {"params": state.params, "statistics": state.statistics}
        n = len(self._target)
        features = self.extract(params, self._target.records, range(n))
        numbers: dict[str, int | float] = {"round": round_}
        labels, error = np.full(n, OUTLIER, np.int32), None
        if jax.process_index() == 0:
            try:
                labels, found = self.make_labels(round_, features)
                numbers |= found
            except Exception as e:  # the others wait to hear; then it is raised
                error = e
        labels, is_known = _from_process_0(labels, error is None)
        if isinstance(error, RunError):
            raise RoundError(f"round {round_}: {error}") from error
        if error is not None:
            raise error
        if not is_known:
            raise RoundError(
                f"round {round_}: no clusters; the log of process 0 says why"
            )
        if round_:
            numbers["label_agreement"] = clustering.agreement(before, labels)
        numbers["cluster_seconds"] = time.monotonic() - began
        return labels, features, numbers

    def _with_labels(
        self, state: UnsupervisedState, found: memory.Memory, labels: Labels
    ) -> UnsupervisedState:
        """The state with the round's memory and labels, where they belong."""
        abstract: Any = self._program.abstract_state
        places = {"memory": abstract.memory, "labels": abstract.labels}
        new = sharding.put(
            {"memory": found, "labels": labels},
            jax.tree.map(lambda leaf: leaf.sharding, places),
        )
        return dataclasses.replace(state, **new)


def _from_process_0(labels: Labels, is_known: bool) -> tuple[Labels, bool]:
    """What process 0 gives, on every process."""
    if jax.process_count() == 1:
        return labels, is_known
    with jax.transfer_guard("allow"):  # it fetches its result implicitly
        found = multihost_utils.broadcast_one_to_all(
            np.append(labels, np.int32(is_known))
        )
    found = np.asarray(found)
    return found[:-1], bool(found[-1])
