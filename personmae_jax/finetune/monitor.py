"""Retrieval scores of a run while it fine-tunes."""

import numpy as np
from jaxtyping import Float32

from personmae_jax.errors import RunError
from personmae_jax.finetune.model import make_encode
from personmae_jax.finetune.sampling import camera_numbers
from personmae_jax.finetune.step import FinetuneState, Finetuning
from personmae_jax.reid import retrieval
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.features import Extractor
from personmae_jax.reid.retrieval import Scores
from personmae_jax.sharding import matmul_dtype


class Evaluator:
    """Scores a state by the queries and the gallery; every host calls it alike."""

    def __init__(self, finetuning: Finetuning, dataset: ReidDataset):
        """Compiles nothing yet."""
        cfg = finetuning.cfg
        encode = make_encode(cfg, matmul_dtype(cfg.train.matmul_dtype, finetuning.mesh))
        self._extract = Extractor(
            encode, cfg.data, finetuning.mesh, cfg.eval.batch_size
        )
        self._dataset, self._cameras = dataset, camera_numbers(dataset)

    def __call__(self, state: FinetuneState) -> tuple[Scores, float]:
        """Returns the scores, and the mAP with a block of every query hidden.

        Raises:
          RunError: An image cannot be used, or a feature is not finite.
        """
        params = {"params": state.params, "statistics": state.statistics}
        query, gallery, occluded = self._extract.of_people(
            params, self._dataset, self._cameras
        )
        return self._score(query, gallery), self._score(occluded, gallery).mAP

    def _score(
        self, query: Float32[np.ndarray, "q d"], gallery: Float32[np.ndarray, "g d"]
    ) -> Scores:
        asked, stored = (
            retrieval.people_in(self._dataset, part)
            for part in (self._dataset.query, self._dataset.gallery)
        )
        try:
            distances = retrieval.cosine_distances(query, gallery)
            return retrieval.score(distances, asked, stored)
        except ValueError as error:
            raise RunError(
                f"people cannot be sought by these features: {error}"
            ) from error
