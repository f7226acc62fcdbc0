"""What pretraining sees and predicts: image, RegionA, RegionB and its prediction."""

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Int, UInt8

from personmae_jax.data.pipeline import Example
from personmae_jax.engine.pictures import Image, head, side_by_side
from personmae_jax.pixels import patchify, unpatchify

_GREY = 128
_COLOUR_A, _COLOUR_B = (255, 140, 0), (30, 144, 255)  # RGB: orange, blue
_TITLES = ("image", "RegionA", "RegionB", "predicted")


def reconstructions(
    examples: Sequence[Example],
    predicted: UInt8[np.ndarray, "b height width 3"],
    patch: int,
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws a row an example: image with boxes, RegionA, RegionB, predicted RegionB.

    Hidden patches of RegionA are grey. The predictions are of the examples, in order.
    """
    rows = [
        [
            _with_boxes(example),
            _with_hidden(example.region_a, example.visible, patch),
            example.region_b,
            prediction,
        ]
        for example, prediction in zip(examples, predicted, strict=True)
    ]
    picture = np.concatenate([side_by_side(row) for row in rows])
    scale = -(-128 // predicted.shape[2])  # small inputs get 128 pixels a panel
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    step = picture.shape[1] // len(_TITLES)
    places = {title: i * step for i, title in enumerate(_TITLES)}
    colours = {"RegionA": _COLOUR_A, "RegionB": _COLOUR_B}
    return np.concatenate([head(picture.shape[1], places, colours), picture])


def _with_boxes(example: Example) -> Image:
    """The whole image fitted into one panel, RegionA's and RegionB's boxes on it."""
    height, width = example.region_a.shape[:2]
    image_height, image_width = example.image.shape[:2]
    scale = min(height / image_height, width / image_width)
    size = (max(1, round(image_width * scale)), max(1, round(image_height * scale)))
    fitted = cv2.resize(example.image, size, interpolation=cv2.INTER_AREA)
    for box, colour in ((example.box_a, _COLOUR_A), (example.box_b, _COLOUR_B)):
        y, x, box_height, box_width = (round(v * scale) for v in box)
        corner = (x + box_width - 1, y + box_height - 1)
        cv2.rectangle(fitted, (x, y), corner, colour, max(1, height // 128))
    panel = np.full((height, width, 3), 255, np.uint8)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    panel[top : top + size[1], left : left + size[0]] = fitted
    return panel


def _with_hidden(region_a: Image, visible: Int[np.ndarray, " v"], patch: int) -> Image:
    patches = patchify(region_a[None], patch)
    shown = np.full_like(patches, _GREY)
    shown[:, visible] = patches[:, visible]
    height, width = region_a.shape[:2]
    return unpatchify(shown, (height // patch, width // patch), patch)[0]
