"""Images of known people: query, gallery and training images, and what is refused.

Which images answer a query is the business of `retrieval.py`; here is only who is in
an image, which camera saw it, and which part of the protocol it plays.
"""

import dataclasses
import hashlib
import math
import os

import numpy as np
from absl import logging
from jaxtyping import Int64, UInt8

from personmae_jax.config import ImageConfig, SyntheticConfig
from personmae_jax.config_finetune import FinetuneDataConfig
from personmae_jax.data import images
from personmae_jax.data.records import ListedRecords, Records, SyntheticRecords
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.reid import dataset_layouts
from personmae_jax.reid.dataset_layouts import JUNK, LAYOUTS

MAX_SYNTHETIC = 10**6  # images; drawing them takes hours

_READERS = {
    "market1501": dataset_layouts.read_market1501,
    "msmt17": dataset_layouts.read_msmt17,
    "occluded_whole": dataset_layouts.read_occluded_whole,
}


@dataclasses.dataclass(frozen=True, eq=False)
class ReidDataset:
    """Images of known people.

    Training and test identities are numbered apart: the same number in both need not
    be the same person.
    """

    where: str  # what messages call it
    records: Records
    identities: Int64[np.ndarray, " n"]  # of every record; JUNK is nobody's
    cameras: Int64[np.ndarray, " n"]
    query: Int64[np.ndarray, " q"]  # indices of records
    gallery: Int64[np.ndarray, " g"]
    train: Int64[np.ndarray, " t"]


def open_dataset(
    layout: str,
    root: str,
    query_camera: int | None = None,
    *,
    is_scored: bool = True,
) -> ReidDataset:
    """Opens a folder that is laid out as a known data set.

    Distractors (identity 0000 of Market-1501) are gallery images like any other:
    no query shows them.

    Args:
      layout: One of `LAYOUTS`, where each is described.
      root: The folder.
      query_camera: Of id_folders: of the queries; None: the lowest number.
      is_scored: Whether it needs queries and a gallery.

    Raises:
      ConfigError: The folder is laid out otherwise, or nothing can be retrieved.
    """
    if layout != "id_folders" and query_camera is not None:
        raise ConfigError(f"{layout} says what its queries are; name no query camera")
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        raise ConfigError(f"{root!r} {what}; {layout} is {LAYOUTS[layout]}")
    if layout == "id_folders":
        parts = dataset_layouts.read_id_folders(root, query_camera)
    else:
        parts = _READERS[layout](root)
    places = [place for part in parts for place in part]
    ends = np.cumsum([len(part) for part in parts])
    query, gallery, train = np.split(np.arange(len(places)), ends[:-1])
    parts_of = " (train and val)" if layout == "msmt17" else ""
    dataset = ReidDataset(
        where=f"{layout}{parts_of} in {root!r}",
        records=ListedRecords(root, [os.fsencode(path) for path, _, _ in places]),
        identities=np.array([identity for _, identity, _ in places], np.int64),
        cameras=np.array([camera for _, _, camera in places], np.int64),
        query=query,
        gallery=gallery,
        train=train,
    )
    if is_scored:
        check_retrieval(dataset)
    return dataset


def labels_sha256(dataset: ReidDataset) -> str:
    """A digest of who and which camera every image has, by its name, and its parts."""
    parts = {"query": dataset.query, "gallery": dataset.gallery, "train": dataset.train}
    lines = [
        f"{part} {dataset.identities[i]} {dataset.cameras[i]} {dataset.records.name(i)}"
        for part, indices in parts.items()
        for i in indices.tolist()
    ]
    text = "\n".join(sorted(lines))
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def open_people(data: FinetuneDataConfig, *, is_scored: bool) -> ReidDataset:
    """Opens the people of `config.data`; raises as `open_dataset`."""
    if data.layout == "synthetic":
        return synthetic_dataset(data.synthetic, data.synthetic_train)
    return open_dataset(
        *(data.layout, str(data.path), data.query_camera), is_scored=is_scored
    )


def open_scored(layout: str, path: str | None) -> ReidDataset | None:
    """Opens the data set `config.eval.path`; None without: the training data's scores.

    Raises:
      ConfigError: As of `open_dataset`.
    """
    if path is None:
        return None
    try:
        return open_dataset(layout, path)
    except ConfigError as e:
        raise ConfigError(f"config.eval.path: {e}") from e


def synthetic_dataset(
    cfg: SyntheticConfig, num_train: int = 0, query_camera: int | None = None
) -> ReidDataset:
    """Synthetic pedestrians: the first `num_train` identities train, the others test.

    The first shot of every camera is a query; the gallery is every image of the test
    identities (the protocol takes away what the query's own camera saw). For people
    that a run has not seen, `cfg.first_identity` lies above the run's own.

    With a `query_camera` all its images are queries and the gallery is the other
    cameras', so that nobody is nearer for the place alone.

    Raises:
      ConfigError: Nobody is left to test on, or there is only one camera.
    """
    if not 0 <= num_train < cfg.identities:
        raise ConfigError(
            f"{num_train} of {cfg.identities} identities to train on leave none "
            f"to test on; take at most {cfg.identities - 1}"
        )
    shape = (cfg.identities, cfg.cameras, cfg.shots)
    if math.prod(shape) > MAX_SYNTHETIC:
        raise ConfigError(
            f"config.data.synthetic makes {math.prod(shape)} images; take at most "
            f"{MAX_SYNTHETIC}"
        )
    identity, camera, shot = np.indices(shape).reshape(3, -1)
    is_train = identity < num_train
    is_query, is_gallery = shot == 0, np.ones_like(shot, bool)
    if query_camera is not None:
        is_query, is_gallery = camera == query_camera, camera != query_camera
    dataset = ReidDataset(
        where=f"{cfg.identities} synthetic identities",
        records=SyntheticRecords(cfg),
        identities=cfg.first_identity + identity,
        cameras=camera,
        query=np.flatnonzero(~is_train & is_query),
        gallery=np.flatnonzero(~is_train & is_gallery),
        train=np.flatnonzero(is_train),
    )
    check_retrieval(dataset)
    return dataset


def held_out_dataset(own: SyntheticConfig, identities: int = 100) -> ReidDataset:
    """Synthetic people that a run does not know, in two of its cameras."""
    others = SyntheticConfig(
        identities=identities,
        cameras=2,
        first_identity=own.first_identity + own.identities,  # those after its own
        seed=own.seed,
    )
    return synthetic_dataset(others, query_camera=0)


def read_image(
    records: Records, index: int, limits: ImageConfig
) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels of one record, within the limits of the settings.

    Raises:
      RunError: It cannot be used; names it. Nothing may stand in for a known person.
    """
    try:
        data = records.read(index)
        return images.decode(
            data, max_pixels=limits.max_pixels, min_side=limits.min_side
        )[0]
    except (images.BadImage, OSError) as error:
        raise RunError(
            f"{records.name(index)} cannot be used ({error}); fix it, or take it "
            "out of the data set"
        ) from error


def read_resized(
    records: Records,
    index: int,
    limits: ImageConfig,
    out: UInt8[np.ndarray, "height width 3"],
) -> None:
    """Fills `out` with the whole image of one record; raises as `read_image`."""
    image = read_image(records, index, limits)
    images.crop_resize(image, images.Box(0, 0, *image.shape[:2]), out)


def check_training(dataset: ReidDataset) -> None:
    """Refuses training images from which nobody can be told from somebody else.

    Raises:
      ConfigError: There are none, or fewer than two identities.
    """
    if not len(dataset.train):
        raise ConfigError(f"{dataset.where} has no images to train on")
    people = dataset.identities[dataset.train]
    identities, counts = np.unique(people, return_counts=True)
    if len(identities) < 2:
        raise ConfigError(
            f"{dataset.where} has one identity to train on; it takes 2 or more"
        )
    alone = dataset.train[np.isin(people, identities[counts == 1])]
    if len(alone):
        logging.warning(
            "%s: %d identities to train on have one image only, e.g. %s, which stands "
            "for all of theirs in a batch; add images of them or take them out",
            dataset.where,
            len(alone),
            dataset.records.name(int(alone[0])),
        )


def check_retrieval(dataset: ReidDataset) -> None:
    """Refuses a data set in which no query has a match.

    Raises:
      ConfigError: There is none.
    """
    where = dataset.where
    pairs = np.stack([dataset.identities, dataset.cameras], axis=1)
    query = np.unique(pairs[dataset.query], axis=0)
    gallery = np.unique(pairs[dataset.gallery], axis=0)
    pairs = np.unique(np.concatenate([query, gallery]), axis=0)
    if not len(query):
        raise ConfigError(f"{where} has no query image")
    if len(np.unique(pairs[:, 1])) == 1:
        raise ConfigError(
            f"{where}: every image is of camera {pairs[0, 1]}; retrieval is scored "
            "across cameras, so there must be 2 or more. If none are known, give the "
            "queries another camera than the gallery, or make a folder for each "
            "identity (id_folders), where the first of two or more images is queried "
            "among the others"
        )
    if not len(gallery):
        raise ConfigError(f"{where} has no gallery image")
    shared = np.intersect1d(query[:, 0], gallery[:, 0])
    shared = shared[shared != JUNK]
    if not len(shared):
        raise ConfigError(
            f"{where}: no identity of the query is in the gallery (numbers "
            f"{query[0, 0]} to {query[-1, 0]} against {gallery[0, 0]} to "
            f"{gallery[-1, 0]}); is either of another data set?"
        )
    seen_twice = pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]]
    if not np.isin(shared, seen_twice).any():
        raise ConfigError(
            f"{where}: each identity of the query was seen by one camera only; "
            "retrieval is scored across cameras"
        )
