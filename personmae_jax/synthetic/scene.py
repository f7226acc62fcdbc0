"""Where a pedestrian is seen: cameras, their backgrounds, light and stains.

A camera has its own size of crop, colour cast, blur and viewpoint, and sees many
backgrounds, so that none of them tells the camera. Whatever is large (a background,
a field of noise) is rendered once, kept in a bounded cache and never
written again; an image only cuts a window out of it.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import Float, Shaped, UInt8

_BACKGROUNDS = 24  # a camera
_PLACE_WIDTH = 320  # pixels; an image sees a window of about 76
_PLACE_SLACK = 24  # rows by which a window may move up and down
_FIELD_SIZE = 400  # pixels, more than any image has


@dataclasses.dataclass(frozen=True, eq=False)
class Camera:
    """What a camera makes of the light; its crops measure height x width pixels."""

    height: int
    width: int
    gamma: float
    mixing: Float[np.ndarray, "3 3"]  # of red, green and blue, after gamma
    haze: float  # added, 1 is white
    pitch: float  # 0: at eye level; larger: from above, legs shorter than the trunk
    lit_from_left: bool
    blur: int  # side of a box filter in pixels; 1: sharp

    def cast(self, colours: Shaped[np.ndarray, "*n 3"]) -> UInt8[np.ndarray, "*n 3"]:
        """Returns what this camera records of RGB `colours` in 0 to 255."""
        seen = self.haze + (colours / 255) ** self.gamma @ self.mixing
        return (255 * seen).clip(0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def camera_of(seed: int, index: int) -> Camera:
    rng = np.random.default_rng([seed, 3, index])
    height = int(rng.integers(144, 173))
    return Camera(
        height=height,
        width=round(height * rng.uniform(0.42, 0.48)),
        gamma=float(rng.uniform(0.85, 1.2)),
        mixing=_mixing(rng),
        haze=float(rng.uniform(0.0, 0.06)),
        pitch=float(rng.uniform(-0.05, 0.28)),
        lit_from_left=bool(rng.random() < 0.5),
        blur=int(rng.choice((1, 1, 3))),
    )


def _mixing(rng: np.random.Generator) -> Float[np.ndarray, "3 3"]:
    """Returns a camera's gains, saturation and crosstalk between the channels."""
    saturation = rng.uniform(0.7, 1.1)
    crosstalk = rng.uniform(-0.08, 0.08, (3, 3))
    mixing = saturation * np.eye(3) + (1 - saturation) / 3
    mixing += crosstalk - crosstalk.mean(axis=0)  # each column keeps its sum
    return mixing * rng.uniform(0.9, 1.1) * np.exp(rng.uniform(-0.07, 0.07, 3))


def window(
    seed: int, camera: int, background: float, across: float, down: float
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns a view of one of the camera's backgrounds; the rest lies in 0 to 1."""
    seen_by = camera_of(seed, camera)
    x = int(across * (_PLACE_WIDTH - seen_by.width))
    y = int(down * _PLACE_SLACK)
    place = _place(seed, camera, int(background * _BACKGROUNDS))
    return place[y : y + seen_by.height, x : x + seen_by.width]


@functools.lru_cache(maxsize=256)
def _place(seed: int, camera: int, index: int) -> UInt8[np.ndarray, "rows columns 3"]:
    rng = np.random.default_rng([seed, 5, camera, index])
    seen_by = camera_of(seed, camera)
    image = np.zeros((seen_by.height + _PLACE_SLACK, _PLACE_WIDTH, 3), np.uint8)
    _PLACES[index % len(_PLACES)](rng, image)
    return frozen(seen_by.cast(mottled(rng, image)))


@functools.lru_cache(maxsize=8)
def _smooth_field(sigma: float, strength: float) -> UInt8[np.ndarray, "side side"]:
    noise = _noise(np.random.default_rng([7]), _FIELD_SIZE, _FIELD_SIZE, sigma)
    return frozen((128 + strength * noise).astype(np.uint8))


def smooth_noise(
    sigma: float, strength: float, shape: tuple[int, int], draws: Iterator[float]
) -> UInt8[np.ndarray, "height width"]:
    """Returns noise of `shape` around 128: a window of a field that is drawn once.

    Args:
      sigma: Size of its stains in pixels.
      strength: Its standard deviation in grey levels.
      shape: Height and width in pixels.
      draws: Uniform numbers in 0 to 1; the next two choose the window.
    """
    y, x = (int(next(draws) * (_FIELD_SIZE - side)) for side in shape)
    return _smooth_field(sigma, strength)[y : y + shape[0], x : x + shape[1]]


def frozen(array: np.ndarray) -> np.ndarray:
    array.setflags(write=False)
    return array


def _noise(
    rng: np.random.Generator, height: int, width: int, sigma: float
) -> Float[np.ndarray, "{height} {width}"]:
    """Returns noise of deviation 1, within 2.5, whose stains measure `sigma` pixels."""
    step = max(1.0, 1.5 * sigma)
    coarse = rng.standard_normal((int(height / step) + 2, int(width / step) + 2))
    noise = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return (noise / noise.std()).clip(-2.5, 2.5)


def mottled(
    rng: np.random.Generator, image: UInt8[np.ndarray, "h w 3"]
) -> Float[np.ndarray, "h w 3"]:
    """Returns the image with stains of several sizes, so that no surface stays flat."""
    height, width = image.shape[:2]
    sizes = (4.0, 8.0, 16.0)
    stains = np.sum([_noise(rng, height, width, size) for size in sizes], axis=0)
    return (image + 13 / math.sqrt(3) * stains[..., None]).clip(0, 255)


def tone(rng: np.random.Generator, low: int, high: int) -> np.ndarray:
    """Returns a dull colour: grey between `low` and `high`, slightly tinted."""
    return rng.uniform(low, high) + rng.uniform(-18, 18, 3)


def _tiles(
    rng: np.random.Generator,
    image: np.ndarray,
    rows: tuple[int, int],
    size: tuple[int, int],
    colours: tuple[np.ndarray, np.ndarray],
    bond: bool,
) -> None:
    """Fills image rows with tiles of `size` (height, width) in a joint of its own."""
    (top, bottom), (high, wide), (face, joint) = rows, size, colours
    image[top:bottom] = joint
    for row, y in enumerate(range(top, bottom, high)):
        for x in range(-(wide // 2) * (row % 2) * bond, image.shape[1], wide):
            colour = face + rng.normal(0, 14)
            corner = (x + wide - 2, min(y + high, bottom) - 2)
            cv2.rectangle(image, (x, y), corner, colour.tolist(), -1)


def _brick_wall(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    kerb = int(height * rng.uniform(0.62, 0.75))
    brick = np.array([150, 88, 66]) + rng.uniform(-15, 15, 3)
    _tiles(rng, image, (0, kerb), (13, 30), (brick, tone(rng, 165, 200)), True)
    paving = (tone(rng, 120, 160), tone(rng, 60, 90))
    _tiles(rng, image, (kerb, height), (16, 40), paving, True)
    for x in rng.integers(0, width, 2).tolist():  # doors
        cv2.rectangle(image, (x, 30), (x + 40, kerb), (52, 60, 66), -1)
        cv2.rectangle(image, (x + 7, 42), (x + 33, kerb - 30), (110, 122, 128), -1)
    cv2.line(image, (0, kerb), (width, kerb), (70, 66, 62), 4)


def _shops(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    image[:] = tone(rng, 150, 190)
    kerb = int(height * rng.uniform(0.62, 0.75))
    for x in range(-20, width, 66):
        glass = tone(rng, 40, 95)
        cv2.rectangle(image, (x + 6, 34), (x + 58, kerb - 14), glass.tolist(), -1)
        shine = np.array([[x + 12, kerb - 16], [x + 40, 36], [x + 54, 36]])
        cv2.fillPoly(image, [shine], (glass + 45).tolist())
        cv2.line(image, (x + 32, 34), (x + 32, kerb - 14), (190, 190, 186), 3)
        sign = rng.uniform(50, 190, 3)
        cv2.rectangle(image, (x + 4, 8), (x + 60, 26), sign.tolist(), -1)
    slabs = (tone(rng, 140, 180), tone(rng, 90, 115))
    _tiles(rng, image, (kerb, height), (20, 28), slabs, False)


def _park(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    grass = int(height * rng.uniform(0.42, 0.55))
    image[:grass] = (62, 84, 52)
    image[grass:] = (112, 128, 74)
    for _ in range(260):  # leaves above, tufts below
        x, y = int(rng.integers(width)), int(rng.integers(height))
        base = image[y, x].astype(float) + rng.normal(0, 24)
        axes = (int(rng.integers(5, 12)), int(rng.integers(3, 8)))
        cv2.ellipse(image, (x, y), axes, 0, 0, 360, base.clip(0, 255).tolist(), -1)
    for x in range(int(rng.integers(10, 40)), width, 74):  # trunks
        cv2.line(image, (x, 0), (x + 4, grass + 12), (78, 62, 48), 13)
        cv2.line(image, (x - 3, 0), (x + 1, grass + 12), (112, 92, 72), 4)
    path = np.array(
        [[0, height - 34], [width, height - 58], [width, height], [0, height]]
    )
    cv2.fillPoly(image, [path], (168, 156, 132))


def _corridor(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    floor = int(height * rng.uniform(0.6, 0.72))
    wall, rail = tone(rng, 165, 205), tone(rng, 70, 110)
    image[:floor] = wall
    for x in range(-10, width, 84):
        cv2.rectangle(image, (x, 24), (x + 40, floor), rail.tolist(), -1)
        cv2.rectangle(image, (x + 8, 36), (x + 32, 76), (wall - 30).tolist(), -1)
        poster = rng.uniform(60, 200, 3).tolist()
        cv2.rectangle(image, (x + 50, 30), (x + 74, 66), poster, -1)
        cv2.rectangle(image, (x + 55, 36), (x + 69, 48), (225, 222, 215), -1)
    cv2.line(image, (0, floor - 22), (width, floor - 22), rail.tolist(), 6)
    checks = (tone(rng, 110, 150), tone(rng, 60, 90))
    _tiles(rng, image, (floor, height), (18, 32), checks, False)


def _street(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    image[:] = tone(rng, 92, 120)
    far = int(height * rng.uniform(0.3, 0.4))
    facade = (tone(rng, 130, 180), tone(rng, 60, 90))
    _tiles(rng, image, (0, far), (24, 22), facade, False)
    for x in range(int(rng.integers(0, 30)), width, 110):  # parked cars
        paint = rng.uniform(40, 200, 3)
        cv2.rectangle(image, (x + 14, far - 14), (x + 66, far + 4), (50, 58, 66), -1)
        cv2.rectangle(image, (x, far + 2), (x + 84, far + 24), paint.tolist(), -1)
        for wheel in (x + 16, x + 66):
            cv2.circle(image, (wheel, far + 24), 8, (28, 28, 30), -1)
    for x in range(-60, width, 44):  # a crossing
        stripe = [[x, height], [x + 22, height], [x + 62, far + 50], [x + 46, far + 50]]
        cv2.fillPoly(image, [np.array(stripe)], (196, 194, 186))


def _concrete(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width, _ = image.shape
    kerb = int(height * rng.uniform(0.6, 0.72))
    image[:kerb] = tone(rng, 120, 160)
    for x in range(0, width, 58):
        cv2.line(image, (x, 0), (x, kerb), (84, 84, 82), 3)
    for _ in range(9):  # graffiti
        start = rng.uniform((0, 20), (width, kerb - 20))
        curve = start + np.cumsum(rng.normal(0, 16, (5, 2)), axis=0)
        paint = rng.uniform(30, 220, 3).tolist()
        cv2.polylines(image, [curve.astype(np.int32)], False, paint, 9, cv2.LINE_AA)
    setts = (tone(rng, 90, 130), tone(rng, 50, 70))
    _tiles(rng, image, (kerb, height), (14, 22), setts, True)


_PLACES = (_brick_wall, _shops, _park, _corridor, _street, _concrete)
