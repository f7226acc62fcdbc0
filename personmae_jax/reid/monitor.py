"""Retrieval scores of encoders while they train."""

import dataclasses
import math

import numpy as np
from absl import logging
from jaxtyping import Float32, Int32, PyTree

from personmae_jax.errors import RunError
from personmae_jax.reid import retrieval
from personmae_jax.reid.datasets import ReidDataset
from personmae_jax.reid.features import Extractor, camera_centred
from personmae_jax.reid.retrieval import Scores

Features = Float32[np.ndarray, "_n d"]


class Monitor:
    """Scores networks by one data set; every host calls it alike and gets the same.

    A network whose features cannot be ranked, such as a collapsed one, scores nan and
    a warning: a run of days does not end for a number that nothing learns from.
    """

    def __init__(
        self,
        extract: Extractor,
        people: ReidDataset,
        *,
        cameras: Int32[np.ndarray, " n"] | None = None,
        num_networks: int = 1,
        centre_cameras: bool = False,
    ):
        """Compiles nothing yet.

        Args:
          extract: Makes the features of all networks at once, one after the other, so
            that an image is read once.
          people: The queries and the gallery.
          cameras: Of all records; for an encoder that takes them.
          num_networks: Whose features have one length.
          centre_cameras: Take each camera's mean feature off first.
        """
        self._extract, self._people, self._cameras = extract, people, cameras
        self._num_networks, self._centre = num_networks, centre_cameras

    def __call__(self, params: PyTree) -> list[tuple[Scores, Scores]]:
        """Returns the scores of each network: by whole and by occluded queries.

        Raises:
          RunError: An image cannot be used; names it.
        """
        query, gallery, occluded = (
            np.split(features, self._num_networks, axis=1)
            for features in self._extract.of_people(params, self._people, self._cameras)
        )
        return [
            (self._score(whole, against), self._score(hidden, against))
            for whole, against, hidden in zip(query, gallery, occluded, strict=True)
        ]

    def _score(self, query: Features, gallery: Features) -> Scores:
        people = self._people
        query_people = retrieval.people_in(people, people.query)
        gallery_people = retrieval.people_in(people, people.gallery)
        if self._centre:
            cameras = [query_people.cameras, gallery_people.cameras]
            features = np.concatenate([query, gallery])
            features = camera_centred(features, np.concatenate(cameras))
            query, gallery = np.split(features, [len(query)])
        try:
            distances = retrieval.cosine_distances(query, gallery)
            return retrieval.score(distances, query_people, gallery_people)
        except RunError as error:
            logging.warning("No retrieval scores: %s.", error)
            counts = {"queries": len(query), "gallery": len(gallery)}
            names = {field.name for field in dataclasses.fields(Scores)}
            unknown = dict.fromkeys(names, math.nan)
            return Scores(**{**unknown, "queries_without_match": 0, **counts})
