"""Promises about decoding whatever lies in a data set, and about cutting regions."""

import io
import pickle
import random
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from image_files import encode
from PIL import Image

from personmae_jax.data import images
from personmae_jax.data.images import BadImage, Box, Outcome, crop_resize, decode

_LIMITS = {"max_pixels": 50_000_000, "min_side": 8}


def _smooth(height=60, width=44) -> np.ndarray:
    """A picture that survives JPEG, without any symmetry."""
    small = np.random.default_rng(0).integers(40, 216, (4, 3, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _bomb(side: int) -> bytes:
    """A grey 1-bit PNG of side x side pixels, all black."""

    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return len(content).to_bytes(4) + kind + content + crc.to_bytes(4)

    pack = zlib.compressobj(9)
    rows = b"".join(pack.compress(bytes(1 + side // 8)) for _ in range(side))
    header = side.to_bytes(4) * 2 + bytes((1, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", rows + pack.flush())
        + chunk(b"IEND", b"")
    )


def _assert_close(pixels, expected, mean_error):
    assert pixels.shape == expected.shape
    assert pixels.dtype == np.uint8
    error = np.abs(pixels.astype(int) - expected.astype(int))
    assert error.mean() < mean_error


def _bad(data: bytes, **limits) -> Outcome:
    with pytest.raises(BadImage) as caught:
        decode(data, **(_LIMITS | limits))
    return caught.value.outcome


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("BMP", {}),
        ("PPM", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_plain_pictures_of_every_format_decode_to_their_pixels(name, options):
    pixels, outcome = decode(encode(_smooth(), name, **options), **_LIMITS)
    assert outcome is Outcome.PLAIN
    _assert_close(pixels, _smooth(), 3 if name == "JPEG" else 0.01)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "PPM"])
def test_greyscale_is_repeated(name):
    pixels, outcome = decode(encode(_smooth(), name, "L"), **_LIMITS)
    assert outcome is Outcome.GREYSCALE
    grey = np.asarray(Image.fromarray(_smooth()).convert("L"))
    _assert_close(pixels, np.stack([grey] * 3, -1), 3 if name == "JPEG" else 0.01)


@pytest.mark.parametrize("name", ["JPEG", "TIFF"])
def test_cmyk_is_converted(name):
    # Pillow writes a JPEG's inks inverted, with Adobe's marker, as everybody does.
    pixels, outcome = decode(encode(_smooth(), name, "CMYK"), **_LIMITS)
    assert outcome is Outcome.CMYK
    _assert_close(pixels, _smooth(), 4)


@pytest.mark.parametrize("name", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(name):
    grey = np.linspace(0, 65535, 60 * 44).reshape(60, 44).astype(np.uint16)
    pixels, outcome = decode(encode(grey, name), **_LIMITS)
    assert outcome is Outcome.SIXTEEN_BIT
    np.testing.assert_array_equal(pixels, np.stack([grey >> 8] * 3, -1))


def test_sixteen_bit_colour_is_scaled():
    colour = np.random.default_rng(0).integers(0, 65536, (16, 16, 3)).astype(np.uint16)
    data = cv2.imencode(".png", colour[..., ::-1])[1].tobytes()
    pixels, outcome = decode(data, **_LIMITS)
    assert outcome is Outcome.SIXTEEN_BIT
    np.testing.assert_array_equal(pixels, colour >> 8)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(name, orientation):
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = Image.fromarray(_smooth())
    if orientation > 1:
        stored = stored.transpose(inverse[orientation])
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(np.asarray(stored), name, exif=_exif(orientation), **options)
    pixels, outcome = decode(data, **_LIMITS)
    assert outcome is (Outcome.PLAIN if orientation == 1 else Outcome.ROTATED)
    _assert_close(pixels, _smooth(), 3 if name == "JPEG" else 0.01)


def test_a_broken_exif_block_does_not_lose_the_picture():
    data = encode(_smooth(), "JPEG", exif=_exif(6))
    start = data.index(b"Exif\0\0") + 6
    broken = data[:start] + b"\xee" * 20 + data[start + 20 :]
    pixels, outcome = decode(broken, **_LIMITS)
    assert outcome is Outcome.PLAIN
    _assert_close(pixels, _smooth(), 3)


@pytest.mark.parametrize("name", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(name):
    frames = [Image.fromarray(255 - _smooth())]
    options = {"lossless": True} if name == "WEBP" else {}
    data = encode(_smooth(), name, save_all=True, append_images=frames, **options)
    pixels, outcome = decode(data, **_LIMITS)
    assert outcome is Outcome.ANIMATED
    _assert_close(pixels, _smooth(), 12 if name == "GIF" else 0.01)  # a GIF's palette


def test_transparency_is_laid_on_white():
    pixels = np.dstack([_smooth(), np.full((60, 44), 255, np.uint8)])
    pixels[:30, :, 3] = 0
    decoded, outcome = decode(encode(pixels, "PNG"), **_LIMITS)
    assert outcome is Outcome.ALPHA
    assert (decoded[:30] == 255).all()
    np.testing.assert_array_equal(decoded[30:], _smooth()[30:])


def test_what_cannot_be_an_image_says_why():
    jpeg, png = encode(_smooth(), "JPEG"), encode(_smooth(), "PNG")
    assert _bad(b"") is Outcome.EMPTY
    assert _bad(b"a note to self, named portrait.jpg") is Outcome.NOT_AN_IMAGE
    assert _bad(b"%PDF-1.7 and more of it") is Outcome.NOT_AN_IMAGE
    assert _bad(jpeg[: len(jpeg) // 2]) is Outcome.TRUNCATED
    assert _bad(png[: len(png) // 2]) is Outcome.TRUNCATED
    assert _bad(jpeg[:-2] + bytes(2000) + jpeg[-2:]) is Outcome.DAMAGED
    assert _bad(encode(_smooth()[:1, :1], "PNG")) is Outcome.TOO_SMALL
    assert _bad(encode(_smooth(7, 80), "JPEG")) is Outcome.TOO_SMALL
    floats = Image.fromarray(np.zeros((20, 20), np.float32))
    file = io.BytesIO()
    floats.save(file, "TIFF")
    assert _bad(file.getvalue()) is Outcome.UNSUPPORTED


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF"])
def test_the_pixel_limit_holds_for_every_path(name):
    data = encode(_smooth(), name)
    decode(data, max_pixels=60 * 44, min_side=8)
    assert _bad(data, max_pixels=60 * 44 - 1) is Outcome.TOO_LARGE


def test_a_decompression_bomb_costs_no_memory():
    # A fresh process: the peak of this one may hide any growth.
    program = """
import resource, sys
from personmae_jax.data.images import BadImage, decode
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = sys.stdin.buffer.read()
start = peak()
try:
    decode(data, max_pixels=int(sys.argv[1]), min_side=8)
except BadImage as bad:
    print(bad.outcome.name, peak() - start)
"""
    bomb = _bomb(20_000)
    assert len(bomb) < 100_000
    for max_pixels in (50_000_000, 10**9):  # ours, and Pillow's own limit
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", program, str(max_pixels)],
            input=bomb,
            capture_output=True,
            check=True,
            timeout=60,
        )
        outcome, kilobytes = done.stdout.split()
        assert outcome == b"TOO_LARGE"
        assert int(kilobytes) < 20_000  # decoded it would take 400 MB, or 50 as bits
        assert not done.stderr


def test_hostile_bytes_end_as_an_image_or_as_a_bad_one():
    frames = [Image.fromarray(255 - _smooth())]
    seeds = [
        encode(_smooth(), "JPEG", exif=_exif(6)),
        encode(_smooth(), "JPEG", "CMYK"),
        encode(_smooth(), "PNG", "P", exif=_exif(3)),
        encode(_smooth(), "PNG", "RGBA"),
        encode(_smooth(), "GIF", save_all=True, append_images=frames),
        encode(_smooth(), "WEBP"),
        encode(_smooth(), "TIFF"),
        encode(_smooth(), "BMP"),
        encode(_smooth(), "PPM"),
    ]
    chance = random.Random(0)
    num_bad = 0
    for number in range(900):
        data = bytearray(seeds[number % len(seeds)])
        if chance.random() < 0.3:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.choice((1, 3, 20))):
            if data:
                place = chance.randrange(min(len(data), chance.choice((64, 10**6))))
                data[place] = chance.randrange(256)
        try:
            pixels, _ = decode(bytes(data), max_pixels=10**6, min_side=8)
            assert pixels.dtype == np.uint8
        except BadImage:
            num_bad += 1
    assert 200 < num_bad < 900


def test_every_outcome_fits_an_int8_and_has_a_reason():
    for outcome in Outcome:
        assert np.int8(outcome) == outcome
        assert outcome.reason
        assert outcome.is_bad + outcome.is_converted == (outcome != Outcome.PLAIN)
    assert pickle.loads(pickle.dumps(Outcome.CMYK)) is Outcome.CMYK
    assert str(BadImage(Outcome.EMPTY)) == "empty"


def test_crop_resize_cuts_the_box_into_the_given_array():
    image = _smooth(120, 80)
    batch = np.zeros((2, 20, 30, 3), np.uint8)
    crop_resize(image, Box(15, 7, 20, 30), batch[1])
    np.testing.assert_array_equal(batch[1], image[15:35, 7:37])
    assert not batch[0].any()


def test_crop_resize_is_bicubic_and_does_not_alias():
    image = _smooth(50, 40)
    out = np.zeros((100, 80, 3), np.uint8)
    crop_resize(image, Box(0, 0, 50, 40), out)
    expected = Image.fromarray(image).resize((80, 100), Image.Resampling.BICUBIC)
    _assert_close(out, np.asarray(expected), 1)
    # A fine checkerboard shrunk eightfold is an even grey.
    checks = np.indices((800, 640)).sum(0) % 2 * 255
    board = np.repeat(checks[..., None], 3, -1).astype(np.uint8)
    crop_resize(board, Box(0, 0, 797, 635), out)
    assert np.abs(out.astype(int) - 127).max() < 12


def test_opencv_starts_no_threads_of_its_own():
    assert images.cv2.getNumThreads() <= 1


def _noise(height: int = 32, width: int = 16) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)


def _decode_small(data: bytes):
    return decode(data, max_pixels=1 << 20, min_side=8)


@pytest.mark.parametrize("extra", [b"\0", bytes(4), b"\x12\x34\x56\x78" * 4])
def test_a_few_bytes_before_the_end_marker_cost_no_image(extra):
    whole = simplejpeg.encode_jpeg(_noise())
    pixels, outcome = _decode_small(whole[:-2] + extra + whole[-2:])
    assert outcome in (Outcome.PLAIN, Outcome.EXTRA_BYTES)  # or read as padding
    np.testing.assert_array_equal(pixels, _decode_small(whole)[0])
    for cut in (2, 3, 20, 100):
        with pytest.raises(BadImage):
            _decode_small(whole[:-cut] + extra)


def test_a_jpeg_of_thousands_of_scans_is_refused_before_it_is_decoded():
    out = io.BytesIO()
    Image.fromarray(_noise()).save(out, "JPEG", progressive=True)
    whole = out.getvalue()
    assert _decode_small(whole)[1] == Outcome.PLAIN
    last = whole.rindex(b"\xff\xda")
    hostile = whole[:last] + whole[last:-2] * 20_000 + whole[-2:]
    table = hostile.index(b"\xff\xdb")  # a gap before it hides nothing
    for data in (hostile, hostile[:table] + b"\0\0" + hostile[table:]):
        with pytest.raises(BadImage, match="more than 100 scans"):
            _decode_small(data)


def test_a_baseline_jpeg_of_many_scans_is_refused_too():
    out = io.BytesIO()
    Image.fromarray(_noise()).save(out, "JPEG")
    whole = out.getvalue()
    scan = whole.index(b"\xff\xda")
    one_plane = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\x00"
    hostile = whole[:scan] + one_plane * 1500 + b"\xff\xd9"
    with pytest.raises(BadImage, match="more than 100 scans"):
        _decode_small(hostile)
    assert _decode_small(whole)[1] == Outcome.PLAIN


def test_exif_orientation_counts_wherever_it_stands_before_the_pixels():
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    Image.fromarray(_noise()).save(out, "JPEG", exif=exif)
    data = out.getvalue()
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    rest = data[:start] + data[end:]
    for marker in (b"\xff\xdb", b"\xff\xc0", b"\xff\xc4", b"\xff\xda"):
        place = rest.index(marker)
        moved = rest[:place] + data[start:end] + rest[place:]
        assert _decode_small(moved)[1] == Outcome.ROTATED


@pytest.mark.parametrize("block", [b"MM\0*\0\0\0\x08", b"MM\0*\0\0"])
def test_an_empty_exif_block_hides_no_other(block):
    out = io.BytesIO()
    Image.fromarray(_noise()).save(out, "JPEG", exif=_exif(6))
    data = out.getvalue()
    segment = b"\xff\xe1" + (8 + len(block)).to_bytes(2) + b"Exif\0\0" + block
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    for place in (start, end):
        doubled = data[:place] + segment + data[place:]
        assert _decode_small(doubled)[1] == Outcome.ROTATED


@pytest.mark.parametrize("seen", [0, 1])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_an_image_that_is_transparent_everywhere_keeps_its_colours(kind, seen):
    """All but everywhere: of a white image nothing could be learnt either."""
    pixels = np.dstack([_noise(), np.zeros((32, 16), np.uint8)])
    pixels[:seen, 0, 3] = 255
    out = io.BytesIO()
    options = dict(lossless=True, exact=True) if kind == "WEBP" else {}
    Image.fromarray(pixels).save(out, kind, **options)
    found, outcome = _decode_small(out.getvalue())
    assert outcome == Outcome.ALL_TRANSPARENT
    np.testing.assert_array_equal(found, pixels[..., :3])
