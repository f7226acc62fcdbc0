"""Training batches of P clusters with K images each, a function of (seed, round, step).

The clusters of a round's batches are a stream of passes. In each pass every cluster
comes once, in an order of its own; where P does not divide their number, those left
over at its end are left out, others in each pass. Where there are fewer than P, the
stream goes on within the batch. Of a cluster, each pass shows the next image of a
permutation, and K - 1 others with it.

Source: RandomMultipleGallerySampler of damo-cv/TransReID-SSL, whose K - 1 others are of
other cameras too; there they are drawn at random, here each camera has its turn.
"""

import numpy as np
from jaxtyping import Int32, Int64

from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.data.batches import Batch
from personmae_jax.data.rng import RecordOrder
from personmae_jax.reid.batches import PeopleBatches
from personmae_jax.unsupervised.clustering import OUTLIER
from personmae_jax.unsupervised.data import Unlabelled

_FIRST, _OTHERS = 3, 4  # what random numbers are for; see reid/batches.py


class ClusterSampler:
    """Which image stands in which row of which batch of a round."""

    def __init__(
        self,
        labels: Int32[np.ndarray, " n"],
        cameras: Int32[np.ndarray, " n"],
        *,
        clusters: int,
        images: int,
        across_cameras: bool,
        seed: int,
        round_: int,
    ):
        """Sorts the images by cluster, of which a batch has P = `clusters`.

        The K - 1 others of its `images` are of other cameras than the first if
        `across_cameras`, in clusters that have some.
        """
        order = np.argsort(labels, kind="stable")[np.count_nonzero(labels == OUTLIER) :]
        counts = np.bincount(labels[order])
        self._images_of = np.split(order, np.cumsum(counts)[:-1])
        self._cameras, self._across = cameras, across_cameras
        self._p, self._k, self._seed = clusters, images, (seed, round_)
        state = np.random.SeedSequence(self._seed).generate_state(1)
        self._order = RecordOrder(len(counts), int(state[0]))

    def batch(self, step: int) -> Int64[np.ndarray, " b"]:
        """The images of a whole batch, those of a cluster side by side.

        Args:
          step: From 0 in each round.
        """
        count = len(self._images_of)
        first = step * self._p
        if count >= self._p:
            passes, number = divmod(step, count // self._p)
            first = passes * count + number * self._p
        positions = range(first, first + self._p)
        chosen = self._order.records(positions)
        return np.concatenate(
            [
                self._images(int(cluster), position // count)
                for cluster, position in zip(chosen, positions, strict=True)
            ]
        )

    def _images(self, cluster: int, passes: int) -> Int64[np.ndarray, " k"]:
        own = self._images_of[cluster]
        turns, turn = divmod(passes, len(own))
        rng = np.random.default_rng((*self._seed, _FIRST, cluster, turns))
        first = rng.permutation(own)[turn]
        rng = np.random.default_rng((*self._seed, _OTHERS, cluster, passes))
        others = rng.permutation(own[own != first])
        if self._across:
            cameras = self._cameras[others]
            elsewhere = cameras != self._cameras[first]
            if elsewhere.any():
                others, cameras = others[elsewhere], cameras[elsewhere]
                others = others[np.argsort(_ranks(cameras), kind="stable")]
        if not len(others):
            others = own
        return np.concatenate([[first], np.resize(others, self._k - 1)])


def _ranks(values: Int32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """How many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    starts = np.searchsorted(values[order], values[order])
    ranks = np.empty(len(values), np.int64)
    ranks[order] = np.arange(len(values)) - starts
    return ranks


class ClusterBatches(PeopleBatches):
    """The batches of one host in one round; `label` is the memory's row of an image.

    That of a step is a dict of arrays whose leading axis is b = P * K / num_hosts:
      `image`: uint8 (b, height, width, 3), RGB.
      `label`: int32 (b,).
    """

    def __init__(
        self,
        target: Unlabelled,
        cfg: UnsupervisedConfig,
        clusters: Int32[np.ndarray, " n"],
        rows: Int32[np.ndarray, " n"],
        round_: int,
        *,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """Prepares the stream, as `HostBatches`; nothing is read yet.

        `rows` are of the memory, for every image. The first batch has the number
        round_ * steps_per_round.
        """
        super().__init__(
            *(target.records, cfg.data, cfg.augment, cfg.train.seed),
            batch_size=cfg.batch_size,
            host=host,
            num_hosts=num_hosts,
        )
        self._rows = rows
        self._first_step = round_ * cfg.train.steps_per_round
        self._sampler = ClusterSampler(
            *(clusters, target.cameras),
            clusters=cfg.sampling.clusters,
            images=cfg.sampling.images,
            across_cameras=cfg.sampling.across_cameras,
            seed=cfg.train.seed,
            round_=round_,
        )

    def choose(self, step: int) -> tuple[Int64[np.ndarray, " b"], Batch]:
        chosen = self._sampler.batch(step - self._first_step)
        return chosen, {"label": self._rows[chosen]}
