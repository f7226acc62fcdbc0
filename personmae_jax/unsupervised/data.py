"""The images of the target, of which nobody knows who is on them.

Training gets nothing else: no identity, and not the order of the files, which are named
by identity. The order is that of the SHA-256 of each file's bytes, so that neither
renaming nor relabelling changes a run.
"""

import dataclasses
import hashlib
import os
from concurrent import futures

import numpy as np
from jaxtyping import Int32, Int64

from personmae_jax.config_unsupervised import UnsupervisedConfig
from personmae_jax.data.records import Records, folder_records
from personmae_jax.data.workers import num_cores
from personmae_jax.errors import ConfigError
from personmae_jax.reid.datasets import ReidDataset, check_retrieval, open_people


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Unlabelled:
    """Images without identities, in the order of their bytes' hash."""

    records: Records
    indices: Int64[np.ndarray, " n"]  # of each among the records that it is from
    cameras: Int32[np.ndarray, " n"]  # counted from 0; all 0 if not known
    sha256: str  # of all images in order, and of their cameras

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def num_cameras(self) -> int:
        return len(np.unique(self.cameras))


class ChosenRecords:
    """Some of other records, by their place in a list."""

    def __init__(self, records: Records, indices: Int64[np.ndarray, " n"]):
        self._records, self._indices = records, indices

    def __len__(self) -> int:
        return len(self._indices)

    def read(self, index: int) -> bytes:
        return self._records.read(int(self._indices[index]))

    def name(self, index: int) -> str:
        return self._records.name(int(self._indices[index]))


def open_target(cfg: UnsupervisedConfig) -> tuple[Unlabelled, ReidDataset | None]:
    """Opens the images to train on, and the data set by which the run is scored.

    Returns:
      The images; and the people to query, None if there are none or nobody asks for
      scores. Only scores and `known_` numbers may look at the latter.

    Raises:
      ConfigError: There are no such images, or too few, or queries that none of the
        gallery matches.
    """
    data, people = cfg.data, None
    if data.layout == "images":
        where, records = f"{data.path!r}", folder_records(str(data.path))
        indices = np.arange(len(records))
        cameras = np.zeros(len(records), np.int64)
        if data.camera_folders:
            parts = [records.name(i).split(os.sep) for i in range(len(records))]
            tops = [part[0] for part in parts]
            if alone := [part[0] for part in parts if len(part) == 1]:
                raise ConfigError(
                    f"config.data.camera_folders: {len(alone)} images in {data.path!r} "
                    f"are in no camera's folder, e.g. {alone[0]}; move them into one"
                )
            cameras = np.unique(tops, return_inverse=True)[1]
    else:
        # Training images alone do, where there are no queries.
        people = open_people(data, is_scored=False)
        if cfg.eval.every_rounds and cfg.eval.path is None and len(people.query):
            check_retrieval(people)
        where, records, indices = people.where, people.records, people.train
        cameras = people.cameras[indices]
        people = people if cfg.eval.every_rounds and len(people.query) else None
    least = max(2 * cfg.sampling.clusters, cfg.cluster.k1 + 1)
    if len(indices) < least:
        raise ConfigError(
            f"{where} has {len(indices)} images to train on; "
            f"{cfg.sampling.clusters} clusters a step and k1={cfg.cluster.k1} take "
            f"{least} or more"
        )
    return unlabelled(records, indices, cameras), people


def unlabelled(
    records: Records,
    indices: Int64[np.ndarray, " n"],
    cameras: Int64[np.ndarray, " n"],
) -> Unlabelled:
    """Puts the images `indices` in the order of their bytes; reads each of them once.

    Raises:
      ConfigError: An image cannot be read.
    """

    def digest(index: int) -> bytes:
        try:
            return hashlib.sha256(records.read(index)).digest()
        except OSError as error:
            raise ConfigError(
                f"{records.name(index)} cannot be read ({error}); make it readable or "
                "take it out of the data set"
            ) from error

    numbers = np.unique(cameras, return_inverse=True)[1].astype(np.int32)
    with futures.ThreadPoolExecutor(num_cores()) as pool:
        digests = list(pool.map(digest, indices.tolist()))
    # Images that are equal to the byte may stand in any order, but for their cameras.
    keys = [d + int(n).to_bytes(4) for d, n in zip(digests, numbers, strict=True)]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    chosen = indices[order]
    return Unlabelled(
        records=ChosenRecords(records, chosen),
        indices=chosen,
        cameras=numbers[order],
        sha256=hashlib.sha256(b"".join(sorted(keys))).hexdigest(),
    )
