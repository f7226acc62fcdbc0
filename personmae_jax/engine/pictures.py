"""Pictures for people to look at: panels side by side under titles, rankings."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import cv2
import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from personmae_jax.engine.storage import write_whole

Image = UInt8[np.ndarray, "_ _ 3"]

_MARGIN = 4  # pixels between panels
_FRAME, _GAP = 4, 12  # pixels: of a frame, and after a query
_MATCH, _OTHER, _BLACK = (0, 160, 0), (220, 0, 0), (0, 0, 0)


def encode(picture: Image) -> bytes:
    """The picture as a PNG file."""
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def write(workdir: epath.Path, name: str, png: bytes) -> None:
    """Writes WORKDIR/pictures/NAME."""
    (workdir / "pictures").mkdir(parents=True, exist_ok=True)
    write_whole(workdir / "pictures" / name, png)


def rankings(
    queries: Sequence[Image],
    found: Sequence[Sequence[Image]],
    is_match: Sequence[Bool[np.ndarray, " _k"]],
) -> UInt8[np.ndarray, "picture_height picture_width 3"]:
    """Draws a row a query: it, then what was found, nearest first.

    An image of the query's identity has a green frame, any other a red one.
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
        rows.append(side_by_side(row))
    picture = np.concatenate(rows)
    step = width + 2 * _FRAME + _MARGIN
    places = {str(i + 1): (i + 1) * step + _GAP + _MARGIN for i in range(longest)}
    line = head(picture.shape[1], {"query": 0} | places)
    return np.concatenate([line, picture])


def _framed(image: Image, colour: tuple[int, int, int]) -> Image:
    height, width, _ = image.shape
    framed = np.full((height + 2 * _FRAME, width + 2 * _FRAME, 3), colour, np.uint8)
    framed[_FRAME:-_FRAME, _FRAME:-_FRAME] = image
    return framed


def side_by_side(panels: Sequence[Image]) -> Image:
    """Panels of one height in a row, white margins around them."""
    pad = ((_MARGIN // 2,) * 2, (_MARGIN // 2,) * 2, (0, 0))
    return np.concatenate([np.pad(p, pad, constant_values=255) for p in panels], axis=1)


def head(
    width: int,
    places: Mapping[str, int],
    colours: Mapping[str, tuple[int, int, int]] = MappingProxyType({}),
) -> Image:
    """A white line with titles, each from its column on."""
    line = np.full((24, width, 3), 255, np.uint8)
    for title, x in places.items():
        at, colour = (x + 4, 17), colours.get(title, _BLACK)
        cv2.putText(
            line, title, at, cv2.FONT_HERSHEY_SIMPLEX, 0.5, colour, 1, cv2.LINE_AA
        )
    return line
