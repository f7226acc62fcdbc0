"""Retrieval scores of encoders while they train."""

import dataclasses
import math
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import Int32, PyTree

from personmae_jax.errors import RunError
from personmae_jax.reid import retrieval
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.features import Extractor, Features, camera_centred
from personmae_jax.reid.retrieval import Scores


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """Scores networks by one data set; every host calls it alike and gets the same.

    A network whose features cannot be ranked, such as a collapsed one, scores nan and
    a warning: a run of days does not end for a number that nothing learns from.
    """

    # Makes the features of all networks at once, one after the other, so that an image
    # is read once.
    extract: Extractor
    people: ReidDataset  # the queries and the gallery
    cameras: Int32[np.ndarray, " n"] | None = None  # for an encoder that takes them
    num_networks: int = 1  # whose features have one length
    centre_cameras: bool = False  # take each camera's mean feature off first

    def __call__(self, params: PyTree) -> list[tuple[Scores, Scores]]:
        """Returns the scores of each network: by whole and by occluded queries."""
        query, gallery, occluded = (
            np.split(features, self.num_networks, axis=1)
            for features in self.extract.of_people(params, self.people, self.cameras)
        )
        return [
            (self._score(whole, against), self._score(hidden, against))
            for whole, against, hidden in zip(query, gallery, occluded, strict=True)
        ]

    def _score(self, query: Features, gallery: Features) -> Scores:
        people = self.people
        query_people = retrieval.people_in(people, people.query)
        gallery_people = retrieval.people_in(people, people.gallery)
        if self.centre_cameras:
            cameras = [query_people.cameras, gallery_people.cameras]
            features = np.concatenate([query, gallery])
            features = camera_centred(features, np.concatenate(cameras))
            query, gallery = np.split(features, [len(query)])
        try:
            distances = retrieval.cosine_distances(query, gallery)
            return retrieval.score(distances, query_people, gallery_people)
        except RunError as error:
            logging.warning("No retrieval scores: %s.", error)
            found: dict[str, Any] = dict.fromkeys(Scores.__annotations__, math.nan)
            found |= {"queries": len(query), "gallery": len(gallery)}
            return Scores(**found | {"queries_without_match": 0})
