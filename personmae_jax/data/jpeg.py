"""What libjpeg does not tell of a JPEG file: Exif, numbers of scans, harmless bytes."""

import re

import numpy as np
import simplejpeg
from jaxtyping import UInt8

SCAN = b"\xff\xda"  # start of scan; never inside the compressed data
MAX_SCANS = 100  # writers make some 10; each costs as much as a whole image
_EXTRA_BYTES = re.compile(r"(?<!\d)(\d{1,2}) extraneous bytes before marker 0xd9")


def walk_header(data: bytes) -> tuple[bool, bool]:
    """(one scan for sure, Exif wherever it stands) by the segments before the pixels.

    Where they cannot be followed, there may be many scans, and there may be Exif.
    """
    has_exif, num_planes = False, 256  # more than any scan has
    place = 2
    while data[place : place + 1] == b"\xff":
        marker = data[place + 1 : place + 2]
        if marker in (b"\xc0", b"\xc1"):  # baseline, extended sequential
            num_planes = int.from_bytes(data[place + 9 : place + 10])
        if marker == b"\xda":  # a scan of fewer planes is not the only one
            return int.from_bytes(data[place + 4 : place + 5]) >= num_planes, has_exif
        has_exif |= marker == b"\xe1" and data.startswith(b"Exif\0\0", place + 4)
        place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return False, b"Exif\0\0" in data


def decode_without_extra_bytes(
    data: bytes, warning: str
) -> UInt8[np.ndarray, "h w 3"] | None:
    """The pixels, if nothing is wrong but a few bytes before the end marker.

    Whatever else libjpeg has to say shows when these bytes are gone.
    """
    match = _EXTRA_BYTES.search(warning)
    end = data.rfind(b"\xff\xd9")
    if not match or end < 0:
        return None
    try:
        return simplejpeg.decode_jpeg(data[: end - int(match[1])] + data[end:], "RGB")
    except (ValueError, MemoryError):
        return None
