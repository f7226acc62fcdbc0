"""Where RegionA and RegionB lie in an image, and where B lies as seen from A.

Everything here is in the frame of the image as the network sees it, which is after
the horizontal flip that both regions share.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Float64

from personmae_jax.config import RegionsConfig
from personmae_jax.data.images import Box

_NUM_TRIES = 10  # torchvision's RandomResizedCrop
# For the flip, four for every try of either region, and for whether B is in A.
NUM_DRAWS = 1 + 2 * _NUM_TRIES * 4 + 1


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
    """Draws RegionA, RegionB inside it or independently, and one flip for both.

    Args:
      numbers: NUM_DRAWS of them, uniform in [0, 1): the randomness of one image.
      image_height: Pixels.
      image_width: Pixels.
      cfg: Ranges of area and aspect, the probabilities of a flip and of B inside A.
      height: Pixels of a region as the network sees it; with `width`, the aspect
        that `cfg.min_aspect` and `cfg.max_aspect` are relative to.
      width: Pixels.

    Returns:
      Boxes inside the image.
    """
    aspects = (cfg.min_aspect * width / height, cfg.max_aspect * width / height)
    areas = (cfg.min_area, cfg.max_area)
    flip, *numbers_of_boxes, nested = numbers.tolist()
    is_flipped = flip < cfg.flip_probability
    half = len(numbers_of_boxes) // 2
    numbers_of_a, numbers_of_b = numbers_of_boxes[:half], numbers_of_boxes[half:]
    box_a = _sample_box(numbers_of_a, image_height, image_width, areas, aspects)
    if cfg.same:
        box_b = box_a
    elif nested < cfg.nested:
        areas = (cfg.min_nested_area, cfg.max_nested_area)
        y, x, height, width = box_a
        box_b = _sample_box(numbers_of_b, height, width, areas, aspects)
        box_b = Box(y + box_b.y, x + box_b.x, box_b.height, box_b.width)
    else:
        box_b = _sample_box(numbers_of_b, image_height, image_width, areas, aspects)
    return Regions(box_a, box_b, is_flipped)


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
    numbers: list[float],
    image_height: int,
    image_width: int,
    areas: tuple[float, float],
    aspects: tuple[float, float],
) -> Box:
    """A box of uniform area and log-uniform aspect, uniformly placed.

    Four numbers make a box; the first that fits into the image is taken. If none
    does, it is the largest centred one whose aspect is in range: it keeps the aspect
    and gives up the area.

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
            return Box(y, x, height, width)
    aspect = min(max(image_width / image_height, aspects[0]), aspects[1])
    height = min(image_height, max(1, round(image_width / aspect)))
    width = min(image_width, max(1, round(image_height * aspect)))
    y, x = (image_height - height) // 2, (image_width - width) // 2
    return Box(y, x, height, width)
