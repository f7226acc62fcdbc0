"""Promises of what a round leaves for a person to read."""

import dataclasses
import re

import cv2
import numpy as np
import pytest
from etils import epath
from PIL import Image
from unlabelled import tiny_labels, tiny_target

from personmae_jax.errors import RunError
from personmae_jax.unsupervised import report
from personmae_jax.unsupervised.clustering import OUTLIER, Clusters
from personmae_jax.unsupervised.report import write_report

SIZES = (16, 13, 11, 9, 8, 6, 4, 2)  # of clusters; three images are in none


class FlatColours:
    """Images of one colour each, which tells their number."""

    def __len__(self) -> int:
        return 72

    def read(self, index: int) -> bytes:
        pixels = np.full((32, 16, 3), (7, 90, index), np.uint8)  # blue first
        return cv2.imencode(".png", pixels)[1].tobytes()

    def name(self, index: int) -> str:
        return f"{index}.png"


def shown(line: np.ndarray) -> list[int]:
    """The images of a line of the page, by their colours."""
    thumbnails = line[14:110].reshape(96, 10, 50, 3)[50, :, 30].tolist()
    return [red for red, green, blue in thumbnails if (green, blue) == (90, 7)]


def test_a_page_shows_images_of_the_clusters_that_it_names(tmp_path, monkeypatch):
    rng, titles = np.random.default_rng(0), []
    target = dataclasses.replace(tiny_target(), records=FlatColours())
    labels = np.repeat([*range(8), OUTLIER], [*SIZES, 3]).astype(np.int32)
    labels = rng.permutation(labels)
    features = rng.standard_normal((9, 16))[labels]
    features[labels == 5] += rng.standard_normal((6, 16))
    draw = report._line
    monkeypatch.setattr(
        report, "_line", lambda *given: titles.append(given[1]) or draw(*given)
    )
    clusters = Clusters(labels=labels, eps=0.5)
    features = features.astype(np.float32)
    write_report(epath.Path(tmp_path), target, clusters, features, "0.png")
    with Image.open(tmp_path / "pictures/0.png") as picture:
        lines = np.asarray(picture).reshape(13, 114, 500, 3)
    told = []
    for title, line in zip(titles[:-1], lines[:-1], strict=True):
        kind, number, *counts = re.fullmatch(
            r"(.*): cluster (\d), (\d+) images of (\d) cameras", title
        ).groups()
        members = np.flatnonzero(labels == int(number))
        cameras = len(np.unique(target.cameras[members]))
        assert [int(count) for count in counts] == [len(members), cameras]
        assert len(shown(line)) == min(len(members), 10)
        assert {*shown(line)} <= {*members.tolist()}
        told.append((kind, int(number)))
    assert told[:8] == [("largest", c) for c in (0, 1, 2, 3)] + [
        ("of middle size", c) for c in (2, 3, 4, 5)
    ]
    assert told[8] == ("least compact", 5)
    assert titles[-1] == "3 images in no cluster"
    assert shown(lines[-1]) == np.flatnonzero(labels == OUTLIER).tolist()


def test_a_disk_that_takes_no_clusters_is_told_in_a_sentence(tmp_path):
    (tmp_path / "clusters.csv" / "in the way").mkdir(parents=True)
    features = np.random.default_rng(0).standard_normal((72, 4)).astype(np.float32)
    clusters = Clusters(labels=tiny_labels(), eps=0.5)
    with pytest.raises(RunError, match="the clusters in .* cannot be written"):
        write_report(epath.Path(tmp_path), tiny_target(), clusters, features, "0.png")
