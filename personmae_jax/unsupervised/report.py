"""What a person sees of the clusters: a list of all images, and a page of some."""

import csv
import io

import numpy as np
from etils import epath
from jaxtyping import Float32, Int64, UInt8
from PIL import Image, ImageDraw

from personmae_jax.config import ImageConfig
from personmae_jax.engine import pictures
from personmae_jax.engine.storage import reporting_failure, write_whole
from personmae_jax.reid.datasets import read_resized
from personmae_jax.unsupervised.clustering import OUTLIER, Clusters
from personmae_jax.unsupervised.data import Unlabelled

_KINDS, _SHOWN = 4, 10  # clusters of each kind, and images of each
_HEIGHT, _WIDTH, _MARGIN, _TITLE = 96, 48, 2, 14  # pixels
_LIMITS = ImageConfig(max_pixels=2**62, min_side=1)  # training has read them all


def write_report(
    workdir: epath.Path,
    target: Unlabelled,
    clusters: Clusters,
    features: Float32[np.ndarray, "n d"],
    page_name: str | None,
) -> None:
    """Writes clusters.csv and, if it is given a name, a page of clusters.

    Raises:
      RunError: The disk is full.
    """
    png = pictures.encode(page(target, clusters, features)) if page_name else b""
    text = table(target, clusters)
    with reporting_failure(f"the clusters in {workdir}"):
        write_whole(workdir / "clusters.csv", text)
        if page_name:
            pictures.write(workdir, page_name, png)


def table(target: Unlabelled, clusters: Clusters) -> str:
    """CSV with a line for every image: its name, its cluster (-1: none), its camera."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "cluster", "camera"])
    numbers = (clusters.labels.tolist(), target.cameras.tolist())
    for index, (cluster, camera) in enumerate(zip(*numbers, strict=True)):
        rows.writerow([target.records.name(index), cluster, camera])
    return text.getvalue()


def page(
    target: Unlabelled, clusters: Clusters, features: Float32[np.ndarray, "n d"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A line each for some clusters: large, middling, the least compact; outliers."""
    units = features / np.linalg.norm(features, axis=1, keepdims=True)
    compactness = np.array(
        [
            np.linalg.norm(units[clusters.labels == c].mean(axis=0))
            for c in range(clusters.count)
        ]
    )
    by_size = np.argsort(-clusters.sizes, kind="stable")
    middle = max(0, (clusters.count - _KINDS) // 2)
    kinds = {
        "largest": by_size[:_KINDS],
        "of middle size": by_size[middle : middle + _KINDS],
        "least compact": np.argsort(compactness, kind="stable")[:_KINDS],
    }
    lines = []
    for kind, chosen in kinds.items():
        for c in chosen:
            members = np.flatnonzero(clusters.labels == c)
            cameras = len(np.unique(target.cameras[members]))
            title = f"{kind}: cluster {c}, {len(members)} images of {cameras} cameras"
            lines.append(_line(target, title, members))
    outliers = np.flatnonzero(clusters.labels == OUTLIER)
    if len(outliers):
        title = f"{len(outliers)} images in no cluster"
        lines.append(_line(target, title, outliers))
    return np.concatenate(lines)


def _line(
    target: Unlabelled, title: str, members: Int64[np.ndarray, " m"]
) -> UInt8[np.ndarray, "h w 3"]:
    """A title over up to ten of the images, evenly chosen; each with its camera."""
    chosen = members[np.linspace(0, len(members) - 1, _SHOWN).astype(int)]
    chosen = np.unique(chosen)
    width = _SHOWN * (_WIDTH + _MARGIN)
    canvas = Image.new("RGB", (width, _TITLE + _HEIGHT + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((_MARGIN, 1), title, fill="black")
    for column, index in enumerate(chosen):
        pixels = np.empty((_HEIGHT, _WIDTH, 3), np.uint8)
        read_resized(target.records, int(index), _LIMITS, pixels)
        place = (column * (_WIDTH + _MARGIN), _TITLE)
        canvas.paste(Image.fromarray(pixels), place)
        draw.text(place, f"c{target.cameras[index]}", fill="yellow")
    return np.asarray(canvas)
