"""How a person is rendered: a jointed figure as a plane of part numbers.

The plane has twice the resolution of the image, hence "half pixels". A part's
number is a multiple of 16: the low digits are left to the textures of the garments.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from jaxtyping import UInt8

from personmae_jax.synthetic.person import Person

SHADOW, SKIN, FAR_SKIN, HAIR, SHOES, BAG, ACCENT, SHIRT, DARK = range(16, 160, 16)
TRUNK, NEAR_SLEEVE, FAR_SLEEVE, NEAR_LEG, FAR_LEG, HEM = range(160, 256, 16)

_Canvas = UInt8[np.ndarray, "rows columns"]
_Point = tuple[float, float]  # x, y in half pixels


@dataclasses.dataclass(frozen=True)
class View:
    """Projects body coordinates to the canvas.

    In units of the person's height, x points to the person's left, y up from the
    ground and z forward.
    """

    cos: float  # of the yaw; 1: the person faces the camera
    sin: float  # 1: the person walks to the right
    x: float  # half pixels
    foot: float  # half pixels
    scale: float  # half pixels over the person's height
    pitch: float  # see Camera

    def at(self, x: float, y: float, z: float = 0.0) -> _Point:
        across = (x * self.cos + z * self.sin) * (1 + self.pitch * (y - 0.5))
        rise = y - self.pitch * y * (1 - y)
        return self.x + self.scale * across, self.foot - self.scale * rise

    def half_width(self, lateral: float, depth: float) -> float:
        """Returns the seen half width of an elliptic section of the trunk."""
        return math.hypot(lateral * self.cos, depth * self.sin)


@dataclasses.dataclass(frozen=True)
class Pose:
    """Angles in radians by side: the left is +1, the right -1."""

    near: int  # the side towards the camera
    waist: float  # its height: a stride lowers the trunk
    thigh: dict[int, float]  # forward from hanging down
    knee: dict[int, float]  # by which the shin stays behind the thigh
    arm: dict[int, float]
    elbow: dict[int, float]  # by which the forearm is ahead of the upper arm


def draw_pose(draws: Iterator[float], sin_yaw: float) -> Pose:
    """Returns a moment of a walk; `draws` are uniform numbers in 0 to 1."""
    phase, stride = 2 * math.pi * next(draws), 0.08 + 0.42 * next(draws)
    swing = {side: side * stride * math.sin(phase) for side in (1, -1)}
    lift = {side: max(0.0, side * stride * math.cos(phase)) for side in (1, -1)}
    return Pose(
        near=-1 if sin_yaw > 0 else 1,
        waist=0.5 - 0.45 * (1 - math.cos(swing[1])),
        thigh={side: swing[side] + 0.3 * lift[side] for side in (1, -1)},
        knee={side: 0.06 + 1.2 * lift[side] for side in (1, -1)},
        arm={side: -0.8 * swing[side] for side in (1, -1)},
        elbow={side: 0.15 + 1.9 * next(draws) ** 3 for side in (1, -1)},
    )


def draw_body(canvas: _Canvas, who: Person, view: View, pose: Pose) -> None:
    """Draws the person, what is far from the camera first."""
    reach = int(2 * who.hip * view.scale)
    spot = int(view.x), int(view.foot - 2)
    cv2.ellipse(canvas, spot, (reach, reach // 6), 0, 0, 360, SHADOW, -1)
    head = _Head.of(who, view, pose.waist + 0.425)
    _bag(canvas, who, view, pose, behind=True)
    if view.cos > -0.2:
        _long_hair(canvas, who, head)
    _arm(canvas, who, view, pose, -pose.near)
    _leg(canvas, who, view, pose, -pose.near)
    _leg(canvas, who, view, pose, pose.near)
    _trunk(canvas, who, view, pose.waist)
    _face(canvas, who, view, head)
    _bag(canvas, who, view, pose, behind=False)
    _arm(canvas, who, view, pose, pose.near)


def _leg(canvas: _Canvas, who: Person, view: View, pose: Pose, side: int) -> None:
    cloth, skin = (NEAR_LEG, SKIN) if side == pose.near else (FAR_LEG, FAR_SKIN)
    bare = who.bottom == "skirt" or who.top == "dress"
    thigh_part = skin if bare else cloth
    shin_part = cloth if who.bottom == "trousers" and not bare else skin
    if who.bottom == "boots":
        shin_part = SHOES
    thigh, shin = pose.thigh[side], pose.thigh[side] - pose.knee[side]
    x, y, z = side * who.hip * 0.55, pose.waist, 0.0
    hip = view.at(x, y, z)
    y, z = y - 0.23 * math.cos(thigh), z + 0.23 * math.sin(thigh)
    knee = view.at(x, y, z)
    y, z = y - 0.22 * math.cos(shin), z + 0.22 * math.sin(shin)
    ankle, toe = view.at(x, y, z), view.at(x * 1.2, y - 0.03, z + 0.075)
    wide = who.limb * view.scale
    cuff = wide * (who.flare if shin_part == cloth else 0.55)
    _limb(canvas, SHOES, ankle, toe, 0.028 * view.scale, 0.024 * view.scale)
    _limb(canvas, shin_part, knee, ankle, 0.8 * wide, cuff)
    _limb(canvas, thigh_part, hip, knee, 1.1 * wide, 0.85 * wide)


def _arm(canvas: _Canvas, who: Person, view: View, pose: Pose, side: int) -> None:
    cloth, skin = (NEAR_SLEEVE, SKIN) if side == pose.near else (FAR_SLEEVE, FAR_SKIN)
    upper, lower = pose.arm[side], pose.arm[side] + pose.elbow[side]
    x, y, z = side * who.shoulder, pose.waist + 0.285, 0.0
    shoulder = view.at(x, y, z)
    x += side * 0.03
    y, z = y - 0.16 * math.cos(upper), z + 0.16 * math.sin(upper)
    elbow = view.at(x, y, z)
    y, z = y - 0.15 * math.cos(lower), z + 0.15 * math.sin(lower)
    hand = view.at(x, y, z)
    wide = 0.72 * who.limb * view.scale
    cv2.circle(canvas, (int(hand[0]), int(hand[1])), int(0.85 * wide), skin, -1)
    _limb(
        canvas, cloth if who.sleeve > 1 else skin, elbow, hand, 0.9 * wide, 0.7 * wide
    )
    part = cloth if who.sleeve > 0 else skin
    _limb(canvas, part, shoulder, elbow, 1.05 * wide, 0.9 * wide)
    if who.bag == "handbag" and side == who.bag_side:
        _box(canvas, (hand[0], hand[1] + 0.08 * view.scale), (0.06, 0.05), view)


def _trunk(canvas: _Canvas, who: Person, view: View, waist: float) -> None:
    half, hips = view.half_width, view.half_width(who.hip, who.depth)
    levels = [
        (waist + 0.345, half(0.045, 0.04)),
        (waist + 0.31, half(who.shoulder, 0.6 * who.depth)),
        (waist + 0.22, half(who.shoulder - 0.01, who.depth)),
        (waist + 0.12, half(who.waist, 0.9 * who.depth)),
        (waist - 0.02, hips),
    ]
    long_top = who.top in ("dress", "coat")
    if long_top or who.bottom == "skirt":
        ends = [levels[3], (who.hem, half(who.hip + 0.035, who.depth + 0.04))]
        _section(canvas, HEM if long_top else NEAR_LEG, view, ends)
    _section(canvas, TRUNK, view, levels)
    if who.top in ("jacket", "coat") and view.cos > 0.2:
        opening = [(waist + 0.345, 0.03), (waist + 0.2, 0.045), (waist - 0.02, 0.02)]
        _section(canvas, SHIRT, view, opening, ahead=0.8 * who.depth)
    if not long_top:
        _section(canvas, DARK, view, [(waist, hips), (waist - 0.025, hips)])
    if who.logo and abs(view.cos) > 0.5:
        front = math.copysign(0.5 * who.depth, view.cos)
        centre = view.at(0.0, waist + 0.2, front)
        turns = [2 * math.pi * corner / who.logo for corner in range(who.logo)]
        size = 0.062 * view.scale
        ring = [
            (centre[0] + size * view.cos * math.sin(t), centre[1] - size * math.cos(t))
            for t in turns
        ]
        cv2.fillPoly(canvas, [np.array(ring, np.int32)], ACCENT)


@dataclasses.dataclass(frozen=True)
class _Head:
    """Where the head is; `back` of its half width is where its back lies."""

    x: float
    y: float
    rx: float
    ry: float
    neck: _Point
    back: float

    @classmethod
    def of(cls, who: Person, view: View, height: float) -> "_Head":
        x, y = view.at(0.0, height, 0.015)
        size = who.head * view.scale * (1 + 0.5 * view.pitch)
        neck = view.at(0.0, height - 0.09)
        return cls(x, y, 0.052 * size, 0.072 * size, neck, -view.sin)

    def blob(
        self, canvas: _Canvas, part: int, dx: float, dy: float, sx: float, sy: float
    ) -> None:
        """Draws an ellipse; offset and size in half widths and heights of the head."""
        centre = int(self.x + dx * self.rx), int(self.y + dy * self.ry)
        axes = int(sx * self.rx), int(sy * self.ry)
        cv2.ellipse(canvas, centre, axes, 0, 0, 360, part, -1)


def _long_hair(canvas: _Canvas, who: Person, head: _Head) -> None:
    """Draws the hair that falls on the back, if there is any."""
    if who.hair in ("bob", "long"):
        length = 0.5 if who.hair == "bob" else 1.3
        head.blob(canvas, HAIR, 0.35 * head.back, length - 0.1, 1.15, 0.3 + length)
    elif who.hair == "tail":
        start = head.x + 0.9 * head.back * head.rx, head.y
        end = head.x + 1.6 * head.back * head.rx, head.y + 1.7 * head.ry
        _limb(canvas, HAIR, start, end, 0.4 * head.rx, 0.25 * head.rx)


def _face(canvas: _Canvas, who: Person, view: View, head: _Head) -> None:
    top = head.x, head.y
    _limb(canvas, SKIN, top, head.neck, 0.6 * head.rx, 0.65 * head.rx)
    if who.hair == "bald":
        head.blob(canvas, SKIN, 0.0, 0.0, 1.0, 1.0)
    elif who.hair == "curls":
        head.blob(canvas, HAIR, 0.2 * head.back, -0.3, 1.5, 1.15)
    else:
        head.blob(canvas, HAIR, 0.12 * head.back, -0.12, 1.15, 1.05)
    if view.cos > -0.35:
        head.blob(canvas, SKIN, 0.4 * view.sin, 0.14, 0.92 - 0.2 * abs(view.sin), 0.84)
        for eye in (-0.4, 0.4):
            head.blob(canvas, DARK, 0.6 * view.sin + eye * view.cos, 0.02, 0.13, 0.08)
    if view.cos <= -0.2:
        _long_hair(canvas, who, head)
    if who.hair == "bun":
        head.blob(canvas, HAIR, 0.8 * head.back, -1.05, 0.55, 0.4)
    if who.hat:
        head.blob(canvas, ACCENT, 0.0, -0.6, 1.15, 0.5)
        head.blob(canvas, ACCENT, 0.9 * view.sin, -0.32, 0.9, 0.14)


def _bag(canvas: _Canvas, who: Person, view: View, pose: Pose, *, behind: bool) -> None:
    """Draws the bag, or the part of it, that lies behind (or before) the trunk."""
    waist, side = pose.waist, who.bag_side
    if who.bag == "backpack":
        if behind == (view.cos > -0.1):
            centre = view.at(0.0, waist + 0.2, -who.depth - 0.04)
            _box(canvas, centre, (view.half_width(0.1, 0.06), 0.12), view)
        elif view.cos > 0.1:
            for x in (-0.6 * who.shoulder, 0.6 * who.shoulder):
                top = view.at(x, waist + 0.32, who.depth)
                _strap(
                    canvas, BAG, top, view.at(1.2 * x, waist + 0.12, who.depth), view
                )
    elif who.bag == "satchel" and behind == (side * view.sin > 0.5):
        centre = view.at(side * (who.hip + 0.02), waist - 0.02)
        _strap(canvas, BAG, view.at(-0.06 * side, waist + 0.32), centre, view)
        _box(canvas, centre, (0.06, 0.065), view)
    elif who.bag == "suitcase" and behind == (side * view.sin > 0):
        centre = view.at(side * 0.16, 0.15, -0.16)
        _strap(canvas, DARK, view.at(side * 0.15, 0.42, -0.08), centre, view)
        _box(canvas, centre, (0.07, 0.13), view)


def _strap(canvas: _Canvas, part: int, start: _Point, end: _Point, view: View) -> None:
    _limb(canvas, part, start, end, 0.012 * view.scale, 0.012 * view.scale)


def _box(
    canvas: _Canvas, centre: _Point, halves: tuple[float, float], view: View
) -> None:
    """Draws a bag with seam and pocket; `halves` of its width and height."""
    (x, y), (wide, high) = centre, (half * view.scale for half in halves)
    for part, share, top, bottom in (
        (BAG, 1.0, -1.0, 1.0),
        (DARK, 1.0, -0.1, 0.06),
        (ACCENT, 0.5, 0.2, 0.75),
    ):
        start = int(x - share * wide), int(y + top * high)
        end = int(x + share * wide), int(y + bottom * high)
        cv2.rectangle(canvas, start, end, part, -1)


def _section(
    canvas: _Canvas,
    part: int,
    view: View,
    levels: Sequence[tuple[float, float]],
    ahead: float = 0.0,
) -> None:
    """Draws what spans the `levels`, each (height, half width), `ahead` in z."""
    left, right = [], []
    for y, half in levels:
        x, row = view.at(0.0, y, ahead)
        left.append((x - half * view.scale, row))
        right.append((x + half * view.scale, row))
    cv2.fillPoly(canvas, [np.array(left + right[::-1], np.int32)], part)


def _limb(
    canvas: _Canvas, part: int, start: _Point, end: _Point, wide: float, narrow: float
) -> None:
    """Draws a tapering limb with round ends; half widths in half pixels."""
    (x, y), (u, v) = start, end
    length = math.hypot(u - x, v - y) or 1.0
    a, b = (y - v) / length, (u - x) / length
    quad = (
        (x + a * wide, y + b * wide),
        (u + a * narrow, v + b * narrow),
        (u - a * narrow, v - b * narrow),
        (x - a * wide, y - b * wide),
    )
    cv2.fillConvexPoly(canvas, np.array(quad, np.int32), part)
    cv2.circle(canvas, (int(x), int(y)), int(wide), part, -1)
    cv2.circle(canvas, (int(u), int(v)), int(narrow), part, -1)
