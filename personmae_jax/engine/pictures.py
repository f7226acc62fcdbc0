"""What a person looks at: RegionB as predicted, and people as they were found."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8

from personmae_jax.data.pipeline import Example
from personmae_jax.pixels import patchify, unpatchify

Image = UInt8[np.ndarray, "_ _ 3"]

_GREY = 128
_MARGIN = 4  # pixels between panels
_COLOUR_A, _COLOUR_B = (255, 140, 0), (30, 144, 255)  # RGB: orange, blue
_FRAME, _GAP = 4, 12  # pixels: of a frame, and after a query
_MATCH, _OTHER, _BLACK = (0, 160, 0), (220, 0, 0), (0, 0, 0)
_TITLES = ("image", "RegionA", "RegionB", "predicted")


def reconstructions(
    examples: Sequence[Example],
    predicted: UInt8[np.ndarray, "b height width 3"],
    patch: int,
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws a row an example: image with boxes, RegionA, RegionB, predicted RegionB.

    Hidden patches of RegionA are grey.

    Args:
      examples: Of `data/pipeline.py`, in the order of `predicted`.
      predicted: RegionB as the network thinks it looks, in RGB.
      patch: Side of a patch in pixels.
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
    picture = np.concatenate([_side_by_side(row) for row in rows])
    return _titled(picture, predicted.shape[2])


def rankings(
    queries: Sequence[Image],
    found: Sequence[Sequence[Image]],
    is_match: Sequence[Bool[np.ndarray, " _k"]],
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws a row a query: it, then what was found, nearest first.

    An image of the query's identity has a green frame, any other a red one.

    Args:
      queries: At least one, all of one size, as are all images.
      found: Of each query, not all of the same number.
      is_match: Of each query, which of those are of its identity.
    """
    height, width, _ = queries[0].shape
    longest = max(map(len, found))
    nothing = np.full((height + 2 * _FRAME, width + 2 * _FRAME, 3), 255, np.uint8)
    rows = []
    for query, images, matches in zip(queries, found, is_match, strict=True):
        row = [_framed(query, _BLACK), nothing[:, :_GAP]]
        row += [
            _framed(image, _MATCH if match else _OTHER)
            for image, match in zip(images, matches, strict=True)
        ]
        row += [nothing] * (longest - len(images))
        rows.append(_side_by_side(row))
    picture = np.concatenate(rows)
    return np.concatenate([_numbered_head(picture, width, longest), picture])


def _framed(image: Image, colour: tuple[int, int, int]) -> Image:
    height, width, _ = image.shape
    framed = np.full((height + 2 * _FRAME, width + 2 * _FRAME, 3), colour, np.uint8)
    framed[_FRAME:-_FRAME, _FRAME:-_FRAME] = image
    return framed


def _numbered_head(picture: Image, width: int, count: int) -> Image:
    step = width + 2 * _FRAME + _MARGIN
    places = {str(i + 1): (i + 1) * step + _GAP + _MARGIN for i in range(count)}
    return _head(picture.shape[1], {"query": 0} | places)


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


def _side_by_side(panels: Sequence[Image]) -> Image:
    pad = ((_MARGIN // 2,) * 2, (_MARGIN // 2,) * 2, (0, 0))
    return np.concatenate([np.pad(p, pad, constant_values=255) for p in panels], axis=1)


def _titled(rows: Image, panel_width: int) -> Image:
    """Small inputs are enlarged to 128 pixels a panel; titles stand above."""
    scale = -(-128 // panel_width)
    rows = rows.repeat(scale, axis=0).repeat(scale, axis=1)
    step = rows.shape[1] // len(_TITLES)
    places = {title: i * step for i, title in enumerate(_TITLES)}
    colours = {"RegionA": _COLOUR_A, "RegionB": _COLOUR_B}
    return np.concatenate([_head(rows.shape[1], places, colours), rows])


def _head(
    width: int,
    places: Mapping[str, int],
    colours: Mapping[str, tuple[int, int, int]] = MappingProxyType({}),
) -> Image:
    """A white line with titles, each from its column on."""
    head = np.full((24, width, 3), 255, np.uint8)
    for title, x in places.items():
        at, colour = (x + 4, 17), colours.get(title, _BLACK)
        cv2.putText(
            head, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA
        )
    return head
