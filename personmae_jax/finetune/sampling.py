"""Training batches of P identities with K images each, as a function of (seed, step).

An identity's images come in rounds: each round is a permutation of them, of which every
pass takes the next K, and what does not fill K is left out of the round (of 5 images at
K = 4, one). An identity with fewer than K images repeats them, as evenly as can be.

So the people of a batch are distinct, an image repeats only if its identity has fewer
than K, and everybody is seen equally often. `RandomIdentitySampler` of TransReID and
HAP shows an identity as often as it has K images instead, and draws which, so that its
batch k depends on all before it.
"""

import numpy as np
from jaxtyping import Int32, Int64

from personmae_jax.config_finetune import FinetuneConfig, SamplingConfig
from personmae_jax.data.batches import Batch
from personmae_jax.errors import ConfigError
from personmae_jax.reid import datasets
from personmae_jax.reid.batches import GroupSampler, PeopleBatches
from personmae_jax.reid.datasets import ReidDataset

_IMAGES = 1  # what random numbers are for; see reid/batches.py


class IdentitySampler(GroupSampler):
    """The training images in the rows of every batch."""

    def __init__(
        self,
        labels: Int64[np.ndarray, " t"],
        cfg: SamplingConfig,
        seed: int,
    ):
        """Sorts the images by identity; P is at most that of all."""
        super().__init__(labels, cfg.identities, cfg.images, seed)
        self._seed = seed

    def _images(self, group: int, passes: int) -> Int64[np.ndarray, " k"]:
        own = self._images_of[group]
        turns, turn = divmod(passes, max(1, len(own) // self._k))
        rng = np.random.default_rng((self._seed, _IMAGES, group, turns))
        order = np.resize(rng.permutation(len(own)), max(len(own), self._k))
        return own[order[turn * self._k : (turn + 1) * self._k]]


class FinetuneBatches(PeopleBatches):
    """The training batches of one host; picklable, and read by many threads at once.

    That of a step is a dict of arrays whose leading axis is b = P * K / num_hosts:
      `image`: uint8 (b, height, width, 3), RGB.
      `label`: int32 (b,), the identity, 0 .. number of training identities - 1.
      `camera`: int32 (b,), 0 .. number of cameras of the whole data set - 1.
    """

    def __init__(self, dataset: ReidDataset, cfg: FinetuneConfig, **hosts: int):
        """Prepares the stream; nothing is read yet; `hosts` as in `HostBatches`."""
        super().__init__(
            *(dataset.records, cfg.data, cfg.augment, cfg.train.seed),
            batch_size=cfg.batch_size,
            **hosts,
        )
        self._train = dataset.train
        people = dataset.identities[dataset.train]
        self._labels = np.unique(people, return_inverse=True)[1]
        self._cameras = camera_numbers(dataset)[dataset.train]
        self._sampler = IdentitySampler(self._labels, cfg.sampling, cfg.train.seed)

    def choose(self, step: int) -> tuple[Int64[np.ndarray, " b"], Batch]:
        chosen = self._sampler.batch(step)
        labels = self._labels[chosen].astype(np.int32)
        about = {"label": labels, "camera": self._cameras[chosen]}
        return self._train[chosen], about


def camera_numbers(dataset: ReidDataset) -> Int32[np.ndarray, " n"]:
    """The cameras of all records, counted from 0 in the order of their numbers."""
    return np.unique(dataset.cameras, return_inverse=True)[1].astype(np.int32)


def num_identities(dataset: ReidDataset) -> int:
    """How many identities there are to train on."""
    return len(np.unique(dataset.identities[dataset.train]))


def open_training(cfg: FinetuneConfig) -> ReidDataset:
    """Opens the data set that the settings name to train on.

    Raises:
      ConfigError: It is laid out otherwise, it has no query or gallery, or no batch,
        or no camera, can be learned from it.
    """
    dataset = datasets.open_people(cfg.data, is_scored=cfg.eval.path is None)
    datasets.check_training(dataset)
    found = num_identities(dataset)
    if found < cfg.sampling.identities:
        raise ConfigError(
            f"config.sampling.identities={cfg.sampling.identities} exceeds the {found} "
            f"identities that {dataset.where} has to train on; use at most {found}"
        )
    test = np.concatenate([dataset.query, dataset.gallery])
    unseen = np.setdiff1d(dataset.cameras[test], dataset.cameras[dataset.train])
    if cfg.head.use_cameras and len(unseen):
        raise ConfigError(
            f"config.head.use_cameras: no training image of {dataset.where} is of "
            f"camera {', '.join(map(str, unseen))}, so their embeddings would stay "
            "untrained; leave it off"
        )
    return dataset
