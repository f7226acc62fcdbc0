"""Evaluates person retrieval by an encoder: scores, a table, a picture, features."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator

import cv2
import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int64, UInt8

from personmae_jax import sharding
from personmae_jax.config import ImageConfig
from personmae_jax.engine import pictures
from personmae_jax.engine.storage import open_new
from personmae_jax.reid import retrieval
from personmae_jax.reid.datasets import ReidDataset, read_image
from personmae_jax.reid.evaluation_inputs import (
    Request,
    Subject,
    open_folder,
    open_people,
    open_subject,
)
from personmae_jax.reid.features import (
    Encode,
    Extractor,
    Features,
    camera_centred,
    make_encode,
    make_neck_encode,
    with_mirror_image,
)
from personmae_jax.reid.reranking import rerank
from personmae_jax.reid.retrieval import Scores, cosine_distances
from personmae_jax.sharding import matmul_dtype

_IMAGES = 128  # encoded at once by each device
_SHOWN, _TOP = 8, 10  # queries in ranking.png, and images beside each
_HEIGHT = 128  # of one of its images, pixels


def evaluate(request: Request) -> Scores:
    """Scores an encoder; all hosts call it alike and get the same.

    Process 0 says what it does, and writes `retrieval.json`, `ranking.png` and, if
    asked, `features.npz`.

    Raises:
      ConfigError: The request cannot be met; nothing was done.
      RunError: A checkpoint is damaged, an image cannot be used, a feature is zero or
        not finite, or a file cannot be written.
    """
    is_main = jax.process_index() == 0
    subject = open_subject(request)
    people = open_people(request, subject.cfg.data.synthetic)
    folder = open_folder(request) if is_main else None
    mesh = sharding.make_mesh()
    if is_main:
        print(_describe(subject, people, mesh), *subject.notes, sep="\n", flush=True)
    query, gallery = _features(request, subject, people, mesh)
    blocks = (rerank if request.rerank else cosine_distances)(query, gallery)
    ranking = _Ranking(blocks, people)
    scores = retrieval.score(ranking, ranking.query, ranking.gallery)
    if folder is not None:
        with open_new(folder / "retrieval.json") as file:
            text = json.dumps(dataclasses.asdict(scores), indent=2) + "\n"
            file.write(text.encode())
        _write_picture(folder, people, ranking, subject.cfg.data)
        if request.save_features:
            _write_features(folder, people, query, gallery)
    return scores


def table(scores: Scores) -> str:
    """The scores for a person to read, means in percent."""
    cells = {
        "mAP": f"{scores.mAP:.1%}",
        "rank-1": f"{scores.rank1:.1%}",
        "rank-5": f"{scores.rank5:.1%}",
        "rank-10": f"{scores.rank10:.1%}",
        "mINP": f"{scores.mINP:.1%}",
        "queries": f"{scores.queries:,}",
        "without match": f"{scores.queries_without_match:,}",
        "gallery": f"{scores.gallery:,}",
    }
    widths = [max(len(name), len(text)) for name, text in cells.items()]
    lines = (cells.keys(), cells.values())
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


class _Ranking:
    """Blocks of distances on their way to the scores; remembers some rankings."""

    def __init__(
        self, blocks: Iterable[Float[np.ndarray, "_b g"]], people: ReidDataset
    ):
        self.query = retrieval.people_in(people, people.query)
        self.gallery = retrieval.people_in(people, people.gallery)
        last, number = len(people.query) - 1, min(_SHOWN, len(people.query))
        # Places of some queries, evenly spread; of each the nearest gallery images, and
        # which of them match.
        self.shown = np.linspace(0, last, number).round().astype(int).tolist()
        self.found: list[tuple[Int64[np.ndarray, " _k"], Bool[np.ndarray, " _k"]]] = []
        self._blocks = blocks

    def __iter__(self) -> Iterator[Float[np.ndarray, "_b g"]]:
        start = 0
        for block in self._blocks:
            for place in self.shown:
                if start <= place < start + len(block):
                    identity = int(self.query.identities[place])
                    camera = int(self.query.cameras[place])
                    row = block[place - start]
                    self.found.append(
                        retrieval.nearest(row, identity, camera, self.gallery, _TOP)
                    )
            start += len(block)
            yield block


def _describe(subject: Subject, people: ReidDataset, mesh: Mesh) -> str:
    encoder, data, devices = subject.cfg.encoder, subject.cfg.data, mesh.devices
    return (
        f"{subject.name}: ViT {encoder.width}/{encoder.depth}/{encoder.num_heads} on "
        f"{data.height} x {data.width} pixels; {len(people.query):,} queries and "
        f"{len(people.gallery):,} gallery images of {people.where}; on {devices.size} "
        f"{devices.flat[0].device_kind}"
    )


def _features(
    request: Request, subject: Subject, people: ReidDataset, mesh: Mesh
) -> tuple[Features, Features]:
    """Of the queries, and of the gallery."""
    cfg, encode = subject.cfg, _make_encode(request, subject, mesh)
    records = np.concatenate([people.query, people.gallery])
    batch_size = min(_IMAGES * mesh.size, len(records))
    extract = Extractor(encode, cfg.data, mesh, batch_size)
    params = sharding.replicate(subject.params, mesh)
    features = extract(params, people.records, records, people.cameras[records])
    if request.centre_cameras:
        features = camera_centred(features, people.cameras[records])
    query, gallery = np.split(features, [len(people.query)])
    return query, gallery


def _make_encode(request: Request, subject: Subject, mesh: Mesh) -> Encode:
    encoder, data = subject.cfg.encoder, subject.cfg.data
    dtype = matmul_dtype(subject.matmul_dtype, mesh)
    if subject.neck_token is None:
        encode = make_encode(encoder, data, request.feature, dtype)
    else:
        encode = make_neck_encode(encoder, data, subject.neck_token, dtype)
    return with_mirror_image(encode) if request.flip else encode


def _write_features(
    folder: pathlib.Path, people: ReidDataset, query: Features, gallery: Features
) -> None:
    arrays: dict[str, np.ndarray] = {"query": query, "gallery": gallery}
    for part, records in (("query", people.query), ("gallery", people.gallery)):
        arrays[f"{part}_identities"] = people.identities[records]
        arrays[f"{part}_cameras"] = people.cameras[records]
        names = [people.records.name(int(record)) for record in records]
        arrays[f"{part}_names"] = np.array(names)
    with open_new(folder / "features.npz") as file:
        np.savez(file, allow_pickle=False, **arrays)


def _write_picture(
    folder: pathlib.Path, people: ReidDataset, ranking: _Ranking, data: ImageConfig
) -> None:
    width = round(_HEIGHT * data.width / data.height)  # in the encoder's ratio
    size = (max(1, width), _HEIGHT)

    def panels(records: Int64[np.ndarray, " k"]) -> list[UInt8[np.ndarray, "_ _ 3"]]:
        found = (read_image(people.records, int(record), data) for record in records)
        return [cv2.resize(x, size, interpolation=cv2.INTER_AREA) for x in found]

    picture = pictures.rankings(
        panels(people.query[ranking.shown]),
        [panels(people.gallery[places]) for places, _ in ranking.found],
        [is_match for _, is_match in ranking.found],
    )
    with open_new(folder / "ranking.png") as file:
        file.write(pictures.encode(picture))
