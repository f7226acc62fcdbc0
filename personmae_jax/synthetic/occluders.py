"""Things that stand between camera and pedestrian, drawn as each camera sees them."""

import functools

import cv2
import numpy as np
from jaxtyping import UInt8

from personmae_jax.synthetic import scene

_SPREAD = 2  # width of a thing's picture over the camera's: images cut a part out


@functools.lru_cache(maxsize=256)
def occluder(
    seed: int, camera: int, kind: int, variant: int
) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "h w"]]:
    """Returns RGB, already times opacity, and opacity; twice the camera's width.

    `kind` counts up to `NUM_KINDS`.
    """
    seen_by = scene.camera_of(seed, camera)
    rng = np.random.default_rng([seed, 4, camera, kind, variant])
    height, width = seen_by.height, _SPREAD * seen_by.width
    image = np.zeros((2 * height, 2 * width, 3), np.uint8)  # twice, for smooth edges
    mask = np.zeros(image.shape[:2], np.uint8)
    _THINGS[kind](rng, image, mask)
    image = seen_by.cast(scene.mottled(rng, image))
    image *= mask[..., None] > 0
    image, mask = (
        cv2.resize(plane, (width, height), interpolation=cv2.INTER_AREA)
        for plane in (image, mask)
    )
    return scene.frozen(image), scene.frozen(mask)


def _car(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    top = int(height * rng.uniform(0.6, 0.7))
    paint = rng.uniform(30, 210) + rng.uniform(-30, 30, 3)
    body = [[0, height], [10, top + 26], [width // 6, top + 18], [width // 4, top]]
    body += [[width * 3 // 4, top], [width * 5 // 6, top + 18], [width - 8, top + 30]]
    shape = np.array([*body, [width, height]])
    cv2.fillPoly(image, [shape], paint.clip(0, 255).tolist())
    cv2.fillPoly(mask, [shape], 255)
    for left, right in ((0.28, 0.48), (0.52, 0.74)):
        corners = (int(width * left), top + 8), (int(width * right), top + 34)
        cv2.rectangle(image, *corners, (44, 54, 64), -1)
    band = top + 58
    cv2.line(image, (0, band), (width, band), (paint * 0.6).clip(0, 255).tolist(), 5)
    for x in (width // 5, width * 4 // 5):
        cv2.circle(image, (x, height - 4), 30, (26, 26, 28), -1)
        cv2.circle(image, (x, height - 4), 15, (130, 132, 136), -1)


def _pole(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    x, half = width // 2, int(rng.integers(8, 15))
    top = int(height * rng.uniform(-0.2, 0.5))
    cv2.rectangle(mask, (x - half, top), (x + half, height), 255, -1)
    image[:] = scene.tone(rng, 60, 130).clip(0, 255)
    image[:, x - half // 2 : x] = scene.tone(rng, 140, 190).clip(0, 255)
    for y in range(top, height, 64):
        image[max(y, 0) : max(y, 0) + 22] = (196, 176, 60)


def _crates(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    for row in range(int(rng.integers(1, 4))):
        x = width // 2 - 50 + int(rng.integers(-10, 11))
        y = height - 56 * (row + 1)
        colour = np.array([168, 128, 84]) + rng.normal(0, 18)
        cv2.rectangle(image, (x, y), (x + 100, y + 55), colour.tolist(), -1)
        for edge in (y + 4, y + 28, y + 52):
            cv2.line(image, (x, edge), (x + 100, edge), (colour * 0.6).tolist(), 4)
        cv2.line(image, (x, y + 54), (x + 100, y), (colour * 0.7).tolist(), 8)
        cv2.rectangle(mask, (x, y), (x + 100, y + 55), 255, -1)


def _railing(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    image[:] = scene.tone(rng, 50, 170).clip(0, 255)
    top = int(height * rng.uniform(0.5, 0.65))
    for y in (top, height - 26):
        cv2.line(mask, (0, y), (width, y), 255, 16)
    for x in range(0, width, int(rng.integers(30, 46))):
        cv2.line(mask, (x, top), (x, height), 255, 9)


def _bush(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    for _ in range(90):
        x = int(width * (0.5 + rng.uniform(-0.3, 0.3)))
        y = int(height * (1 - abs(rng.normal(0, 0.15))))
        leaf = np.array([66, 92, 48]) + rng.normal(0, 26)
        axes = (int(rng.integers(12, 26)), int(rng.integers(8, 18)))
        cv2.ellipse(image, (x, y), axes, 0, 0, 360, leaf.clip(0, 255).tolist(), -1)
        cv2.ellipse(mask, (x, y), axes, 0, 0, 360, 255, -1)


def _bicycle(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray) -> None:
    height, width = mask.shape
    image[:] = 40  # tyres
    paint = rng.uniform(30, 220, 3).tolist()
    radius = int(height * rng.uniform(0.13, 0.17))
    hub, half = height - radius - 8, int(1.35 * radius)
    middle = width // 2
    rear, front = (middle - half, hub), (middle + half, hub)
    for wheel in (rear, front):
        cv2.circle(mask, wheel, radius, 255, 7, cv2.LINE_AA)
    seat = middle - half // 3, hub - int(1.3 * radius)
    head = middle + int(0.7 * half), hub - int(1.4 * radius)
    pedals = middle, hub
    for start, end in (
        *((rear, seat), (rear, pedals), (seat, pedals), (seat, head)),
        *((head, pedals), (head, front)),
    ):
        cv2.line(mask, start, end, 255, 11)
        cv2.line(image, start, end, paint, 11)
    for x, y in (seat, head):
        cv2.line(mask, (x - 24, y - 8), (x + 24, y - 8), 255, 13)


_THINGS = (_car, _pole, _crates, _railing, _bush, _bicycle)
NUM_KINDS = len(_THINGS)
