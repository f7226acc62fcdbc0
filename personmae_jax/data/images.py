"""From the bytes of one image to the pixels of one region.

A plain JPEG takes the fast path (simplejpeg); every other picture goes through
Pillow. The format is read from the content, never from a name, and the size is
checked before a pixel is decoded.

Importing this module turns OpenCV's own threads off (the pipeline has its own), and
decoding turns Pillow's warnings off: an `Outcome` says what they would.
"""

import contextlib
import enum
import io
import warnings
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image

from personmae_jax.data import jpeg

cv2.setNumThreads(0)

_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_JPEG_START = b"\xff\xd8\xff"
_ORIENTATION = 0x0112  # Exif tag
_SEEN = 2.55  # mean alpha, 1 %: below it an image is white, whatever its colours

# Exif orientation -> (transpose, then flip rows, then flip columns); JEITA CP-3451.
_ORIENTATIONS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Box(NamedTuple):
    """A rectangle of whole pixels; (y, x) is its top left corner."""

    y: int
    x: int
    height: int
    width: int


class Outcome(enum.IntEnum):
    """What became of one image: plain, converted, or bad. Fits an int8.

    Where several conversions apply, the first in this order is told.
    """

    reason: str

    def __new__(cls, value: int, reason: str):
        self = int.__new__(cls, value)
        self._value_ = value
        self.reason = reason
        return self

    PLAIN = 0, "8-bit colour"
    ANIMATED = 1, "several frames; the first was taken"
    ROTATED = 2, "Exif orientation; it was applied"
    CMYK = 3, "CMYK; converted to RGB"
    SIXTEEN_BIT = 4, "16 bits a channel; the upper 8 were kept"
    ALPHA = 5, "transparency; laid on white"
    GREYSCALE = 6, "greyscale; repeated to 3 channels"
    ALL_TRANSPARENT = 7, "transparent all but everywhere; its colours were taken"
    EXTRA_BYTES = 8, "bytes between its pixels and its end; they were left out"

    EMPTY = 32, "empty"
    NOT_AN_IMAGE = 33, "not an image, of a format not known, or its header damaged"
    TRUNCATED = 34, "truncated"
    DAMAGED = 35, "damaged"
    TOO_SMALL = 36, "a side under config.data.min_side"
    TOO_LARGE = 37, "more pixels than config.data.max_pixels"
    UNSUPPORTED = 38, "pixels that are neither 8 nor 16 bits a channel"
    UNREADABLE = 39, "the file or record cannot be read"
    TOO_MANY_SCANS = 40, f"a JPEG of more than {jpeg.MAX_SCANS} scans"

    @property
    def is_bad(self) -> bool:
        return self >= Outcome.EMPTY

    @property
    def is_converted(self) -> bool:
        return Outcome.PLAIN < self < Outcome.EMPTY


class BadImage(Exception):
    """An image that cannot be used; `outcome` says why."""

    def __init__(self, outcome: Outcome):
        super().__init__(outcome)
        self.outcome = outcome

    def __str__(self) -> str:
        return self.outcome.reason


def decode(
    data: bytes, *, max_pixels: int, min_side: int
) -> tuple[UInt8[np.ndarray, "h w 3"], Outcome]:
    """Decodes one image to 8-bit RGB, upright.

    Args:
      data: The content of an image file in one of the formats of `_FORMATS`.
      max_pixels: A larger image is bad; checked before it is decoded. Pillow itself
        refuses anything but a JPEG above 178 million.
      min_side: Pixels; an image with a smaller side is bad.

    Returns:
      The pixels, which belong to the caller, and what had to be converted.

    Raises:
      BadImage: The image cannot be used. Nothing else is raised, whatever the bytes.
    """
    if not data:
        raise BadImage(Outcome.EMPTY)
    if data.startswith(_JPEG_START):
        has_one_scan, has_exif = jpeg.walk_header(data)
        if not has_one_scan and data.count(jpeg.SCAN) > jpeg.MAX_SCANS:
            raise BadImage(Outcome.TOO_MANY_SCANS)
        try:
            height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        except ValueError:  # a rare subsampling, or a damaged header: Pillow knows
            return _decode_any(data, max_pixels, min_side)
        _check_size(int(height), int(width), max_pixels, min_side)
        if colorspace not in ("CMYK", "YCCK"):
            return _decode_jpeg(data, colorspace, has_exif)
    return _decode_any(data, max_pixels, min_side)


def crop_resize(
    image: UInt8[np.ndarray, "h w 3"],
    box: Box,
    out: UInt8[np.ndarray, "height width 3"],
) -> None:
    """Cuts one region and resizes it into `out`.

    Bicubic, as in MAE. Its 4 taps alias once the region is shrunk more than twofold;
    then pixel areas are averaged, unless one side grows, which averaging cannot do.

    Args:
      image: The image as the network sees it.
      box: The region, inside the image.
      out: Where the region is written; contiguous.
    """
    y, x, height, width = box
    crop = image[y : y + height, x : x + width]
    out_height, out_width, _ = out.shape
    shrink_y, shrink_x = height / out_height, width / out_width
    is_area = min(shrink_y, shrink_x) >= 1 and max(shrink_y, shrink_x) > 2
    interpolation = cv2.INTER_AREA if is_area else cv2.INTER_CUBIC
    cv2.resize(crop, (out_width, out_height), dst=out, interpolation=interpolation)


def _decode_jpeg(
    data: bytes, colorspace: str, has_exif: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], Outcome]:
    outcome = Outcome.GREYSCALE if colorspace == "Gray" else Outcome.PLAIN
    try:
        image = simplejpeg.decode_jpeg(data, "RGB")
    except (ValueError, MemoryError) as error:
        image = jpeg.decode_without_extra_bytes(data, str(error))
        if image is None:
            raise BadImage(_failure(error)) from error
        outcome = Outcome.EXTRA_BYTES
    if has_exif:
        try:
            _ignore_pillow_warnings()
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as header:
                orientation = _orientation(header)
        except Exception:
            orientation = 1
        if orientation in _ORIENTATIONS:
            return _orient(image, orientation), Outcome.ROTATED
    return image, outcome


def _decode_any(
    data: bytes, max_pixels: int, min_side: int
) -> tuple[UInt8[np.ndarray, "h w 3"], Outcome]:
    """Pillow's path; its decoders raise nearly anything on hostile bytes."""
    _ignore_pillow_warnings()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(image.height, image.width, max_pixels, min_side)
            is_animated = getattr(image, "is_animated", False)
            orientation = _orientation(image)
            pixels, outcome = _to_rgb(image, data)
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(Outcome.TOO_LARGE) from error
    except Image.UnidentifiedImageError as error:
        is_jpeg = data.startswith(_JPEG_START)
        raise BadImage(Outcome.DAMAGED if is_jpeg else Outcome.NOT_AN_IMAGE) from error
    except Exception as error:
        raise BadImage(_failure(error)) from error
    if orientation in _ORIENTATIONS:
        pixels, outcome = _orient(pixels, orientation), Outcome.ROTATED
    return pixels, Outcome.ANIMATED if is_animated else outcome


def _to_rgb(
    image: Image.Image, data: bytes
) -> tuple[UInt8[np.ndarray, "h w 3"], Outcome]:
    """The first frame's pixels, and the conversion its pixel format needed."""
    # Pillow widens 16-bit grey to "I" in PPM (and in PNG, before 11), else "I" has
    # 32 bits and "F" is a float, both without a known range.
    is_sixteen_bit = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if is_sixteen_bit:
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1), Outcome.SIXTEEN_BIT
    if image.mode in ("I", "F"):
        raise BadImage(Outcome.UNSUPPORTED)
    outcome = Outcome.PLAIN
    if image.mode == "CMYK":
        outcome = Outcome.CMYK
    elif image.format == "PNG" and data[24] == 16:  # IHDR's bit depth
        outcome = Outcome.SIXTEEN_BIT
    elif image.has_transparency_data:
        outcome = Outcome.ALPHA
    elif image.mode in ("1", "L"):
        outcome = Outcome.GREYSCALE
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        pixels = np.asarray(layer)
        if pixels[..., 3].mean() < _SEEN:  # as in many BMP
            return pixels[..., :3].copy(), Outcome.ALL_TRANSPARENT
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return np.array(image.convert("RGB")), outcome


def _ignore_pillow_warnings() -> None:
    """Adds one global filter; `catch_warnings` would not be safe between threads."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _orientation(image: Image.Image) -> int:
    """The Exif orientation, 1 to 8; a broken Exif block is as good as none."""
    # One by one, since Pillow joins those of a JPEG: an empty one would hide the next.
    blocks = [b for _, b in getattr(image, "applist", ()) if b[:6] == b"Exif\0\0"]
    exif = Image.Exif()
    for block in blocks[:4]:  # of thousands each would take its time
        with contextlib.suppress(Exception):
            exif.load(block)
            return exif[_ORIENTATION]
    with contextlib.suppress(Exception):
        return image.getexif().get(_ORIENTATION, 1)
    return 1


def _orient(
    image: UInt8[np.ndarray, "h w 3"], orientation: int
) -> UInt8[np.ndarray, "_h _w 3"]:
    is_transposed, flip_rows, flip_columns = _ORIENTATIONS[orientation]
    if is_transposed:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(
        image[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
    )


def _check_size(height: int, width: int, max_pixels: int, min_side: int) -> None:
    if height * width > max_pixels:
        raise BadImage(Outcome.TOO_LARGE)
    if min(height, width) < min_side:
        raise BadImage(Outcome.TOO_SMALL)


def _failure(error: Exception) -> Outcome:
    """Tells a short file from a damaged one, by libjpeg's and Pillow's words."""
    words = str(error).lower()
    is_short = "premature end of jpeg" in words or "truncated" in words
    return Outcome.TRUNCATED if is_short else Outcome.DAMAGED
