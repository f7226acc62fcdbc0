"""Retrieval scores of student and teacher, both frozen, while they pretrain."""

import jax.numpy as jnp
from etils import epath
from jaxtyping import Array, PyTree

from personmae_jax.config import Config
from personmae_jax.engine.program import Program
from personmae_jax.pretrain.train_step import TrainState
from personmae_jax.reid import datasets
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.features import Extractor, make_encode
from personmae_jax.reid.monitor import Monitor
from personmae_jax.sharding import matmul_dtype


def open_people(cfg: Config) -> ReidDataset | None:
    """The people to score by: those of config.eval.path, or synthetic ones.

    The synthetic ones are the identities after the run's own, in two of its cameras:
    the queries are of the one, the gallery of the other. None: nothing is scored.

    Raises:
      ConfigError: The folder is not laid out as config.eval.layout says.
    """
    if not cfg.eval.every_steps:
        return None
    elsewhere = datasets.open_scored(cfg.eval.layout, cfg.eval.path)
    if elsewhere is not None:
        return elsewhere
    return datasets.held_out_dataset(cfg.data.synthetic, cfg.eval.identities)


class Scorer:
    """Scores a state every config.eval.every_steps, before the first and at the end."""

    best_step = None  # the last checkpoint is the result

    def __init__(self, cfg: Config, program: Program[Config], people: ReidDataset):
        """Compiles nothing yet."""
        encode = make_encode(
            *(cfg.encoder, cfg.data, cfg.eval.feature),
            dtype=matmul_dtype(cfg.train.matmul_dtype, program.mesh),
        )

        def encode_with_each(params: PyTree, pixels: Array, cameras: Array) -> Array:
            return jnp.concatenate([encode(p, pixels, cameras) for p in params], -1)

        self._monitor = Monitor(
            Extractor(encode_with_each, cfg.data, program.mesh, cfg.train.batch_size),
            people,
            num_networks=2,
            centre_cameras=cfg.eval.centre_cameras,
        )
        self._last = program.num_steps
        self._every = cfg.eval.every_steps or self._last

    def restore(self, workdir: epath.Path, step: int) -> None:
        """Nothing: no score depends on an earlier one."""

    def is_due(self, step: int) -> bool:
        """Every config.eval.every_steps and after the last step."""
        return step == self._last or step % self._every == 0

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns the scores as fractions; those of the teacher are named so.

        "occluded" is the score with a block of every query hidden.

        Raises:
          RunError: An image cannot be used.
        """
        del step
        scores = {}
        networks = (state.params["encoder"], state.teacher_params)
        found = zip(("", "teacher_"), self._monitor(networks), strict=True)
        for network, (whole, occluded) in found:
            scores[f"{network}retrieval_mAP"] = whole.mAP
            scores[f"{network}retrieval_rank1"] = whole.rank1
            scores[f"{network}occluded_mAP"] = occluded.mAP
        return scores
