"""Synthetic pedestrians: images with identity, camera and pose that need no download.

An image is a pure function of (seed, identity, camera, shot). The identity owns
body, hair, garments, their textures and the bag (`person.py`); the camera owns
backgrounds, colours, blur and viewpoint (`scene.py`); the shot owns the pose
(`body.py`), the background, the crop, the light and what stands in the way.

Figures are painted by numbers: body parts are drawn into a plane of part numbers,
the textures of the garments are added as further digits, and a palette turns the
numbers into colours. Every part has a height, whose relief gives the shading.
"""

import math
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg
from jaxtyping import Int32, UInt8

from personmae_jax.synthetic import body, scene
from personmae_jax.synthetic.occluders import NUM_KINDS, occluder
from personmae_jax.synthetic.person import PATTERN_ORIGIN, Person, person_of

_MARGIN = 4  # pixels drawn around the crop, so that shading is right at its border
_OPAQUE = 150  # height from which on a part hides what lies behind
# Height of the parts 0, 16, 32, ...: nothing, shadow, skin, and on as in body.
_HEIGHTS = (0, 50, 222, 165, 240, 190, 250, 212, 190, 180, 205, 245, 160, 215, 165, 208)
_FAR = 0.72  # brightness of the limbs on the far side
_OCCLUDED = 0.4  # of the images

_Image = UInt8[np.ndarray, "height width 3"]
_Plane = UInt8[np.ndarray, "height width"]
_Draws = Iterator[float]  # uniform numbers in 0 to 1


def render_pedestrian(seed: int, identity: int, camera: int, shot: int) -> _Image:
    """Returns an RGB crop of a person, about 160 x 76 pixels; the camera sets the size.

    The same arguments give the same pixels in every process and thread.

    Raises:
      ValueError: An argument is negative.
    """
    arguments = {"seed": seed, "identity": identity, "camera": camera, "shot": shot}
    for name, value in arguments.items():
        if value < 0:
            raise ValueError(f"{name}={value} is negative; count from 0")
    numbers = np.random.default_rng([seed, 6, identity, camera, shot]).random(48)
    draws = iter(numbers.tolist())
    seen_by = scene.camera_of(seed, camera)
    image = scene.window(seed, camera, next(draws), next(draws), next(draws))
    image = _add_figure(image, person_of(seed, identity), seen_by, draws)
    if next(draws) < _OCCLUDED:
        image = _add_occluder(image, seed, camera, draws)
    return _expose(image, seen_by, draws)


def encode_pedestrian(seed: int, identity: int, camera: int, shot: int) -> bytes:
    """Returns `render_pedestrian(...)` as a JPEG file of quality 90."""
    image = render_pedestrian(seed, identity, camera, shot)
    return simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")


def _add_figure(
    image: _Image,
    who: Person,
    camera: scene.Camera,
    draws: _Draws,
    aside: float = 0.0,
) -> _Image:
    """Returns the image with a person, `aside` of its middle by that many halves."""
    view = _draw_view(draws, camera, who.stature, aside)
    pose = body.draw_pose(draws, view.sin)
    height, width = camera.height + 2 * _MARGIN, camera.width + 2 * _MARGIN
    parts = np.zeros((2 * height, 2 * width), np.uint8)
    body.draw_body(parts, who, view, pose)
    numbers = cv2.add(parts, _textures(who, view, parts.shape))
    painted = cv2.LUT(numbers, _palette(who, camera)).view(np.uint8)
    painted = cv2.resize(
        painted.reshape(*parts.shape, 4), (width, height), interpolation=cv2.INTER_AREA
    )
    heights = cv2.extractChannel(painted, 3)
    shading = _shading(heights, camera.lit_from_left, draws)
    inside = np.s_[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    colours = cv2.cvtColor(painted[inside], cv2.COLOR_RGBA2RGB)
    colours = cv2.multiply(colours, shading, scale=1 / 128)
    opacity = cv2.convertScaleAbs(heights[inside], alpha=255 / _OPAQUE)
    return _over(image, colours, opacity)


def _draw_view(
    draws: _Draws, camera: scene.Camera, stature: float, aside: float
) -> body.View:
    yaw = 0.5 * math.pi * int(next(draws) * 4) + 1.0 * (next(draws) - 0.5)
    # Detectors cut too large, too small and beside the person.
    size = 0.84 + 0.24 * next(draws)  # standing height over the crop's
    offset = 1 + aside + 0.3 * (next(draws) - 0.5)
    return body.View(
        cos=math.cos(yaw),
        sin=math.sin(yaw),
        x=2 * _MARGIN + camera.width * offset,
        foot=2 * _MARGIN
        + camera.height * (1 + 0.96 * size + 0.14 * (next(draws) - 0.5)),
        scale=2 * camera.height * stature * size,
        pitch=camera.pitch,
    )


def _textures(who: Person, view: body.View, shape: tuple[int, int]) -> _Plane:
    """Returns both garments' shades as the low digits: upper + 4 * lower."""
    x, y = view.at(0.0, 0.7)
    top, left = PATTERN_ORIGIN - int(y), PATTERN_ORIGIN - int(x)
    cut = np.s_[top : top + shape[0], left : left + shape[1]]
    return cv2.addWeighted(who.upper_pattern[cut], 1, who.lower_pattern[cut], 4, 0)


def _palette(who: Person, camera: scene.Camera) -> Int32[np.ndarray, "1 256"]:
    """Returns red, green, blue and height, as the bytes of one number, by number."""
    seen = camera.cast(who.colours)
    skin, hair, shoes, bag, accent, shirt = seen[:6]
    upper, lower = seen[None, 6:10], seen[10:14, None]
    palette = np.zeros((16, 4, 4, 4), np.uint8)  # part, lower shade, upper shade
    palette[..., 3] = np.array(_HEIGHTS)[:, None, None]
    plain = (skin, _FAR * skin, hair, shoes, bag, accent, shirt, 0.5 * hair)
    palette[2:10, ..., :3] = np.array(plain)[:, None, None]
    garments = (upper, upper, _FAR * upper, lower, _FAR * lower, upper)
    for part, shades in enumerate(garments, start=body.TRUNK // 16):
        palette[part, ..., :3] = shades
    return palette.view(np.int32).reshape(1, 256)


def _shading(
    heights: UInt8[np.ndarray, "rows columns"], lit_from_left: bool, draws: _Draws
) -> _Image:
    """Returns the light on every pixel inside the margin, 128 for a level surface.

    Slopes towards the light, above and to one side, are bright; cloth has folds.
    """
    soft = cv2.blur(cv2.blur(heights, (7, 7)), (5, 5))
    below, above = soft[_MARGIN + 2 : 2 - _MARGIN], soft[_MARGIN - 2 : -_MARGIN - 2]
    right, left = np.s_[:, 2 * _MARGIN :], np.s_[:, : -2 * _MARGIN]
    ahead, behind = (right, left) if lit_from_left else (left, right)
    relief = cv2.addWeighted(below[ahead], 0.45, above[behind], -0.45, 128)
    folds = scene.smooth_noise(4.0, 15.0, relief.shape, draws)
    light = cv2.addWeighted(relief, 1, folds, 1, -128)
    return cv2.cvtColor(light, cv2.COLOR_GRAY2RGB)


def _over(image: _Image, colours: _Image, opacity: _Plane) -> _Image:
    """Returns `colours`, already times their opacity, laid over the image."""
    through = cv2.cvtColor(cv2.bitwise_not(opacity), cv2.COLOR_GRAY2RGB)
    return cv2.add(cv2.multiply(image, through, scale=1 / 255), colours)


def _add_occluder(image: _Image, seed: int, camera: int, draws: _Draws) -> _Image:
    """Returns the image behind another person or one of the camera's things."""
    seen_by = scene.camera_of(seed, camera)
    kind = int(next(draws) * (NUM_KINDS + 1))
    if kind == NUM_KINDS:
        other = person_of(seed, 2**31 + int(next(draws) * 2**31))
        aside = 0.8 if next(draws) < 0.5 else -0.8
        return _add_figure(image, other, seen_by, draws, aside)
    variant, across = int(next(draws) * 4), next(draws)
    colours, opacity = occluder(seed, camera, kind, variant)
    left = int(across * (opacity.shape[1] - seen_by.width))
    cut = np.s_[:, left : left + seen_by.width]
    return _over(image, colours[cut], opacity[cut])


def _expose(image: _Image, camera: scene.Camera, draws: _Draws) -> _Image:
    """Returns the image in the shot's own light, through the camera's lens."""
    shape = image.shape[:2]
    light = scene.smooth_noise(30.0, 22.0, shape, draws)
    exposure = 0.75 + 0.5 * next(draws)
    # White balance wanders from shot to shot, as it does between hours of a day.
    balance = [exposure * (0.92 + 0.16 * next(draws)) for _ in range(3)]
    image = cv2.multiply(image, np.array([*balance, 0.0]))
    image = cv2.multiply(image, cv2.cvtColor(light, cv2.COLOR_GRAY2RGB), scale=1 / 128)
    if camera.blur > 1:
        image = cv2.blur(image, (camera.blur, camera.blur))
    grain = scene.smooth_noise(0.7, 2.5, shape, draws)
    grain = cv2.cvtColor(grain, cv2.COLOR_GRAY2RGB)
    return cv2.addWeighted(image, 1, grain, 1, -128)
