"""Who is rendered: body, hair, garments, their textures and colours, bag."""

import dataclasses
import functools

import cv2
import numpy as np
from jaxtyping import UInt8

# RGB. Few and mostly dull, so that many people share them: colour alone must not
# tell who it is. Each cloth has a main and a second colour.
_SKINS = ((236, 196, 168), (214, 166, 132), (176, 124, 90), (118, 80, 58))
_HAIRS = ((34, 28, 26), (72, 50, 36), (128, 94, 58), (150, 146, 142))
_CLOTHS = (
    ((44, 46, 54), (126, 130, 138)),
    ((46, 60, 104), (168, 178, 196)),
    ((122, 118, 114), (214, 210, 202)),
    ((136, 52, 52), (214, 190, 164)),
    ((212, 208, 200), (84, 92, 112)),
    ((74, 98, 70), (188, 186, 146)),
    ((186, 144, 76), (72, 60, 58)),
    ((92, 132, 160), (220, 220, 214)),
)
_EXTRAS = ((52, 48, 50), (158, 112, 70), (206, 200, 190), (66, 92, 140))  # shoes, bag
_PATTERNS = (
    *("plain",) * 11,  # as often as patterned
    *("hoops", "stripes", "diagonal", "checks", "dots", "camouflage"),
    *("band", "halves", "diamonds", "zigzag", "yoke"),
)
_TROUSER_PATTERNS = ("stripes", "checks", "dots", "camouflage", *("plain",) * 5)
PATTERN_ORIGIN = 192  # row and column of a pattern that lie on the chest


@dataclasses.dataclass(frozen=True, eq=False)
class Person:
    """What stays with an identity. Lengths are fractions of the standing height."""

    stature: float  # standing height over the average's
    shoulder: float  # half widths
    waist: float
    hip: float
    depth: float  # of the trunk, half
    limb: float  # half width of a thigh
    head: float  # size over the average's
    hair: str
    hat: bool
    top: str
    sleeve: int  # covered parts of the arm: 0 none, 1 to the elbow, 2 to the wrist
    hem: float  # where a coat, dress or skirt ends, above the ground
    bottom: str
    flare: float  # width of a trouser leg at the ankle over that at the thigh
    bag: str
    bag_side: int  # +1: on the left, -1: on the right
    logo: int  # corners of the patch on chest and back; 0: none
    upper_pattern: UInt8[np.ndarray, "480 400"]
    lower_pattern: UInt8[np.ndarray, "480 400"]
    # RGB of skin, hair, shoes, bag, accents, shirt under the jacket, then the four
    # shades of the upper and of the lower garment.
    colours: UInt8[np.ndarray, "14 3"]


@functools.lru_cache(maxsize=4096)
def person_of(seed: int, identity: int) -> Person:
    draws = iter(np.random.default_rng([seed, 1, identity]).random(48).tolist())

    def within(low: float, high: float) -> float:
        return low + (high - low) * next(draws)

    def pick(options):
        return options[int(next(draws) * len(options))]

    top = pick(("shirt", "shirt", "jacket", "coat", "dress"))
    colours = [pick(_SKINS), pick(_HAIRS), *(pick(_EXTRAS) for _ in range(4))]
    for main, second in np.array([pick(_CLOTHS), pick(_CLOTHS[:3])]):
        colours += [main, second, 0.55 * main + 0.45 * second, 0.6 * main]
    return Person(
        stature=within(0.9, 1.06),
        shoulder=within(0.1, 0.145),
        waist=within(0.07, 0.12),
        hip=within(0.08, 0.115),
        depth=within(0.06, 0.1),
        limb=within(0.036, 0.056),
        head=within(0.92, 1.15),
        hair=pick(("short", "bald", "bob", "long", "tail", "bun", "curls")),
        hat=next(draws) < 0.2,
        top=top,
        sleeve=pick((0, 1, 2, 2)) if top in ("shirt", "dress") else 2,
        hem=within(0.24, 0.4),
        bottom=pick(("trousers", "trousers", "shorts", "skirt", "boots")),
        flare=within(0.55, 1.25),
        bag=pick(("none", "backpack", "satchel", "handbag", "suitcase")),
        bag_side=pick((-1, 1)),
        logo=pick((0, 0, 3, 4, 12)),
        upper_pattern=_pattern(pick(_PATTERNS), pick((12, 16, 22, 30))),
        lower_pattern=_pattern(pick(_TROUSER_PATTERNS), pick((12, 16, 22))),
        colours=np.array(colours).astype(np.uint8),
    )


@functools.lru_cache(maxsize=128)
def _pattern(kind: str, period: int) -> UInt8[np.ndarray, "480 400"]:
    """Returns a texture of four shades, 0 to 3; `period` is in half pixels."""
    y, x = np.mgrid[:480, :400] - PATTERN_ORIGIN
    across, down = abs(x % (2 * period) - period), abs(y % (2 * period) - period)

    def camouflage():
        stains = np.random.default_rng([2, period]).standard_normal(x.shape)
        stains = cv2.GaussianBlur(stains, (0, 0), period / 2)
        return np.digitize(stains / stains.std(), (-0.7, 0, 0.7))

    made = {
        "plain": lambda: 0 * x,
        "hoops": lambda: y // period % 2,
        "stripes": lambda: x // period % 2,
        "diagonal": lambda: (x + y) // period % 2,
        "checks": lambda: x // period % 2 + y // period % 2,
        "dots": lambda: across**2 + down**2 < (0.7 * period) ** 2,
        "camouflage": camouflage,
        "band": lambda: abs(y - 10) < period,
        "halves": lambda: x > 0,
        "diamonds": lambda: 2 * across + down < 1.3 * period,
        "zigzag": lambda: (y + across) // period % 2,
        "yoke": lambda: np.where(y < period - 20, 1, 3 * (y > period + 40)),
    }[kind]
    shades = made().astype(np.uint8)
    shades.setflags(write=False)
    return shades
