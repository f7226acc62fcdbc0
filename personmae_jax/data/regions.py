"""Where RegionA and RegionB lie in an image, and where B lies as seen from A.

Everything here is in the frame of the image as the network sees it, which is after
the horizontal flip that both regions share.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from personmae_jax.config import RegionsConfig
from personmae_jax.data.images import Box

_NUM_TRIES = 10  # torchvision's RandomResizedCrop
NUM_DRAWS = 1 + 2 * _NUM_TRIES * 4  # for the flip, and four for every try


class Regions(NamedTuple):
    """The two regions of one image, in the frame of the flipped image."""

    box_a: Box
    box_b: Box
    is_flipped: bool


def sample_regions(
    numbers: Float64[np.ndarray, " n"],
    image_height: int,
    image_width: int,
    cfg: RegionsConfig,
    height: int,
    width: int,
) -> Regions:
    """BatchRng RegionA and RegionB independently, and one flip for both.

    Args:
      numbers: NUM_DRAWS of them, uniform in [0, 1): the randomness of one image.
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
    flip, *numbers_of_boxes = numbers.tolist()
    is_flipped = flip < cfg.flip_probability
    half = len(numbers_of_boxes) // 2
    boxes_a, boxes_b = (
        _sample_boxes(part, image_height, image_width, areas, aspects)
        for part in (numbers_of_boxes[:half], numbers_of_boxes[half:])
    )
    box_a = next(boxes_a)
    if not cfg.same:
        for box_b in boxes_b:
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


def _sample_boxes(
    numbers: list[float],
    image_height: int,
    image_width: int,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> Iterator[Box]:
    """Boxes of uniform area and log-uniform aspect, uniformly placed.

    Four numbers make a box, and those that do not fit into the image are left out.
    The last box is the largest centred one whose aspect is in range: it keeps the
    aspect and gives up the area.

    Source: the idea of `RandomResizedCrop` in pytorch/vision; ours rounds positions
    uniformly over all that fit.
    """
    image_area = image_height * image_width
    log_low, log_high = math.log(aspects[0]), math.log(aspects[1])
    for i in range(0, len(numbers), 4):
        area, aspect, y, x = numbers[i : i + 4]
        area = (areas[0] + area * (areas[1] - areas[0])) * image_area
        aspect = math.exp(log_low + aspect * (log_high - log_low))
        height = max(1, round(math.sqrt(area / aspect)))
        width = max(1, round(math.sqrt(area * aspect)))
        if height <= image_height and width <= image_width:
            y = int(y * (image_height - height + 1))
            x = int(x * (image_width - width + 1))
            yield Box(y, x, height, width)
    aspect = min(max(image_width / image_height, aspects[0]), aspects[1])
    height = min(image_height, max(1, round(image_width / aspect)))
    width = min(image_width, max(1, round(image_height * aspect)))
    y, x = (image_height - height) // 2, (image_width - width) // 2
    yield Box(y, x, height, width)
