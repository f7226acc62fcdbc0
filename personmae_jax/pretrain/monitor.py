"""Retrieval scores of a run while it trains: of student and teacher, both frozen.

Drawn people are sought by the images of one camera among those of another; a folder of
known people says itself who is sought where.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PyTree

from personmae_jax.config import Config
from personmae_jax.pretrain.experiment import Experiment
from personmae_jax.pretrain.state import TrainState
from personmae_jax.reid import datasets, retrieval
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.features import Extractor, camera_centred, make_encode
from personmae_jax.sharding import matmul_dtype


def open_people(cfg: Config) -> ReidDataset | None:
    """Whom to seek: those of config.eval.path, or drawn ones; None: nobody is sought.

    The drawn ones are the identities after the run's own, in two of its cameras.

    Raises:
      ConfigError: The folder is not laid out as config.eval.layout says.
    """
    if not cfg.eval.every_steps:
        return None
    if cfg.eval.path is not None:
        return datasets.open_dataset(cfg.eval.layout, cfg.eval.path)
    return datasets.held_out_dataset(cfg.data.synthetic, cfg.eval.identities)


class Monitor:
    """Scores a state; every host calls it alike and gets the same."""

    def __init__(self, experiment: Experiment, people: ReidDataset):
        """Compiles nothing yet."""
        cfg, mesh = experiment.cfg, experiment.mesh
        encode = make_encode(
            *(cfg.encoder, cfg.data, cfg.eval.feature),
            dtype=matmul_dtype(cfg.train.matmul_dtype, mesh),
        )

        def encode_with_each(params: PyTree, pixels: Array, cameras: Array) -> Array:
            """An image is read once for student and teacher."""
            return jnp.concatenate([encode(p, pixels, cameras) for p in params], -1)

        self._extract = Extractor(
            encode_with_each, cfg.data, mesh, cfg.train.batch_size
        )
        self._every = cfg.eval.every_steps or experiment.num_steps
        self._last = experiment.num_steps
        self._centre_cameras = cfg.eval.centre_cameras
        self._people = people

    def is_due(self, step: int) -> bool:
        """Every config.eval.every_steps and after the last step."""
        return step == self._last or step % self._every == 0

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Returns the scores by name, as fractions; the teacher's names begin so.

        "occluded" is the score with a block of every query hidden.

        Raises:
          RunError: An image cannot be used.
        """
        networks = (state.params["encoder"], state.teacher_params)
        whole, gallery, occluded = self._extract.of_people(networks, self._people)
        scores = {}
        for name, query in (("retrieval", whole), ("occluded", occluded)):
            halves = zip(np.split(query, 2, 1), np.split(gallery, 2, 1), strict=True)
            for network, pair in zip(("", "teacher_"), halves, strict=True):
                mean_ap, rank1 = self._score(*pair)
                scores[f"{network}{name}_mAP"] = mean_ap
                if name == "retrieval":
                    scores[f"{network}{name}_rank1"] = rank1
        return scores

    def _score(
        self, query: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "g d"]
    ) -> tuple[float, float]:
        """Returns mAP and rank-1; nan if the features say nothing."""
        asked, stored = (
            retrieval.people_in(self._people, part)
            for part in (self._people.query, self._people.gallery)
        )
        features = np.concatenate([query, gallery])
        if self._centre_cameras:
            cameras = np.concatenate([asked.cameras, stored.cameras])
            features = camera_centred(features, cameras)
        try:
            retrieval.lengths(features)
        except ValueError:
            return math.nan, math.nan
        query, gallery = np.split(features, [len(query)])
        scores = retrieval.score(
            retrieval.cosine_distances(query, gallery), asked, stored
        )
        return scores.mAP, scores.rank1
