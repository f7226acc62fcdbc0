"""Where RegionA and RegionB lie in an image, and where B lies as seen from A.

Everything here is in the frame of the image as the network sees it, which is after
the horizontal flip that both regions share.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from personmae_jax.config import RegionsConfig

_NUM_TRIES = 10  # torchvision's RandomResizedCrop


class Box(NamedTuple):
    """A rectangle of whole pixels; (y, x) is its top left corner."""

    y: int
    x: int
    height: int
    width: int


class Regions(NamedTuple):
    """The two regions of one image, in the frame of the flipped image."""

    box_a: Box
    box_b: Box
    is_flipped: bool


def sample_regions(
    rng: np.random.Generator,
    image_height: int,
    image_width: int,
    cfg: RegionsConfig,
    height: int,
    width: int,
) -> Regions:
    """Draws RegionA and RegionB independently, and one flip for both.

    Args:
      rng: Source of randomness.
      image_height: Pixels.
      image_width: Pixels.
      cfg: Ranges of area and aspect, the least overlap, the flip's probability.
      height: Pixels of a region as the network sees it; with `width`, the aspect
        that `cfg.min_aspect` and `cfg.max_aspect` are relative to.
      width: Pixels.

    Returns:
      Boxes inside the image. Where `cfg.min_overlap` is not met in a few draws of B,
      B is A, which meets any.
    """
    aspects = (cfg.min_aspect * width / height, cfg.max_aspect * width / height)
    areas = (cfg.min_area, cfg.max_area)
    is_flipped = rng.random() < cfg.flip_probability
    box_a = _sample_box(rng, image_height, image_width, areas, aspects)
    if cfg.same:
        return Regions(box_a, box_a, is_flipped)
    for _ in range(_NUM_TRIES):
        box_b = _sample_box(rng, image_height, image_width, areas, aspects)
        if cfg.min_overlap <= 0 or overlap(box_a, box_b) >= cfg.min_overlap:
            return Regions(box_a, box_b, is_flipped)
    return Regions(box_a, box_a, is_flipped)


def overlap(box_a: Box, box_b: Box) -> float:
    """Intersection over the smaller box's area, 0 to 1."""
    rows = min(box_a.y + box_a.height, box_b.y + box_b.height) - max(box_a.y, box_b.y)
    columns = min(box_a.x + box_a.width, box_b.x + box_b.width) - max(box_a.x, box_b.x)
    smaller = min(box_a.height * box_a.width, box_b.height * box_b.width)
    return max(rows, 0) * max(columns, 0) / smaller


def relative_geometry(
    box_a: Box, box_b: Box, grid: tuple[int, int]
) -> Float32[np.ndarray, "4"]:
    """Where RegionB's patches lie on RegionA's patch grid.

    Args:
      box_a: RegionA.
      box_b: RegionB, in the same frame.
      grid: Rows and columns of patches of either region.

    Returns:
      (y_offset, x_offset, y_scale, x_scale), such that the centre of RegionB's patch
      row i lies at row `(i + 0.5) * y_scale + y_offset - 0.5` of RegionA's grid, and
      so for columns. Offsets are in patches of A, scales are B's size over A's;
      B = A gives exactly (0, 0, 1, 1), hence exactly i.
    """
    rows, columns = grid
    return np.array(
        (
            (box_b.y - box_a.y) * rows / box_a.height,
            (box_b.x - box_a.x) * columns / box_a.width,
            box_b.height / box_a.height,
            box_b.width / box_a.width,
        ),
        np.float32,
    )


def _sample_box(
    rng: np.random.Generator,
    image_height: int,
    image_width: int,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> Box:
    """A box of uniform area and log-uniform aspect, uniformly placed.

    Draws that do not fit into the image are rejected. Where too many do not, the box
    is the largest centred one whose aspect is in range: this keeps the aspect and
    gives up the area.

    Source: the idea of `RandomResizedCrop` in pytorch/vision; ours rounds positions
    uniformly over all that fit.
    """
    image_area = image_height * image_width
    log_low, log_high = math.log(aspects[0]), math.log(aspects[1])
    for area, aspect, y, x in rng.random((_NUM_TRIES, 4)).tolist():
        area = (areas[0] + area * (areas[1] - areas[0])) * image_area
        aspect = math.exp(log_low + aspect * (log_high - log_low))
        height = max(1, round(math.sqrt(area / aspect)))
        width = max(1, round(math.sqrt(area * aspect)))
        if height <= image_height and width <= image_width:
            y = int(y * (image_height - height + 1))
            x = int(x * (image_width - width + 1))
            return Box(y, x, height, width)
    aspect = min(max(image_width / image_height, aspects[0]), aspects[1])
    height = min(image_height, max(1, round(image_width / aspect)))
    width = min(image_width, max(1, round(image_height * aspect)))
    y, x = (image_height - height) // 2, (image_width - width) // 2
    return Box(y, x, height, width)
