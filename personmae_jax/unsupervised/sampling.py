"""Training batches of P clusters with K images each, a function of (seed, round, step).

Of a cluster, each pass shows the next image of a permutation, and K - 1 others with it.

Source: RandomMultipleGallerySampler of damo-cv/TransReID-SSL, whose K - 1 others are of
other cameras too; there they are drawn at random, here each camera has its turn.
"""

import numpy as np
from jaxtyping import Int32, Int64

from personmae_jax.config_unsupervised import ClusterSamplingConfig, UnsupervisedConfig
from personmae_jax.data.batches import Batch
from personmae_jax.reid.batches import GroupSampler, PeopleBatches
from personmae_jax.unsupervised.data import Unlabelled

_FIRST, _OTHERS = 3, 4  # what random numbers are for; see reid/batches.py


class ClusterSampler(GroupSampler):
    """The images in the rows of every batch of a round, whose steps are from 0."""

    def __init__(
        self,
        labels: Int32[np.ndarray, " n"],
        cameras: Int32[np.ndarray, " n"],
        cfg: ClusterSamplingConfig,
        seed: tuple[int, int],
    ):
        """Sorts the images; `seed` is that of the run, and the round.

        The K - 1 others are of other cameras than the first if `cfg.across_cameras`,
        in clusters that have some.
        """
        self._cameras, self._across = cameras, cfg.across_cameras
        self._seed = seed
        state = np.random.SeedSequence(self._seed).generate_state(1)
        super().__init__(labels, cfg.clusters, cfg.images, int(state[0]))

    def _images(self, group: int, passes: int) -> Int64[np.ndarray, " k"]:
        own = self._images_of[group]
        turns, turn = divmod(passes, len(own))
        rng = np.random.default_rng((*self._seed, _FIRST, group, turns))
        first = rng.permutation(own)[turn]
        rng = np.random.default_rng((*self._seed, _OTHERS, group, passes))
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
        **hosts: int,
    ):
        """Prepares the stream; nothing is read yet; `hosts` as in `HostBatches`.

        `rows` are of the memory, for every image. The first batch has the number
        round_ * steps_per_round.
        """
        super().__init__(
            *(target.records, cfg.data, cfg.augment, cfg.train.seed),
            batch_size=cfg.batch_size,
            **hosts,
        )
        self._rows = rows
        self._first_step = round_ * cfg.train.steps_per_round
        self._sampler = ClusterSampler(
            *(clusters, target.cameras, cfg.sampling, (cfg.train.seed, round_))
        )

    def choose(self, step: int) -> tuple[Int64[np.ndarray, " b"], Batch]:
        chosen = self._sampler.batch(step - self._first_step)
        return chosen, {"label": self._rows[chosen]}
