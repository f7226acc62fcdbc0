"""Promises of features: the encoder's own, in order, whatever batch and mesh."""

import cv2
import jax
import numpy as np
import pytest
import simplejpeg
from exported import make_run, trained_like
from tiny import tiny_config

import personmae_jax
from personmae_jax import sharding
from personmae_jax.data import images
from personmae_jax.data.images import Box
from personmae_jax.errors import ConfigError, RunError
from personmae_jax.reid.features import (
    Extractor,
    camera_centred,
    make_encode,
    with_mirror_image,
)

# Sums in another order, and the encoder's own rounding.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Pictures:
    """Drawn noise, blurred so that JPEG leaves most of it."""

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, (10, 5, 3), np.uint8) for _ in range(count)]
        self.pixels = [cv2.resize(x, (10, 20)) for x in noise]
        self.files = [simplejpeg.encode_jpeg(x) for x in self.pixels]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return self.files[index]

    def name(self, index: int) -> str:
        return f"picture {index}"


@pytest.fixture
def cfg():
    return tiny_config()


@pytest.fixture
def params(cfg):
    return trained_like(cfg.encoder)


def extract(cfg, params, records, indices, *, devices=8, batch_size=8, **options):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    encode = make_encode(cfg.encoder, cfg.data, **options)
    extractor = Extractor(encode, cfg.data, mesh, batch_size)
    return extractor(sharding.replicate(params, mesh), records, indices)


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_features_are_those_of_load_encoder(tmp_path, cfg, params):
    records = Pictures(3)
    pixels = np.empty((3, 16, 8, 3), np.uint8)
    for row, file in zip(pixels, records.files, strict=True):
        image, _ = images.decode(file, max_pixels=10**6, min_side=1)
        images.crop_resize(image, Box(0, 0, 20, 10), row)
    make_run(tmp_path, cfg, {0: (params, params)})
    loaded, apply = personmae_jax.load_encoder(str(tmp_path))
    tokens = np.asarray(apply(loaded, pixels))
    cls, mean = unit(tokens[:, 0]), unit(tokens[:, 1:].mean(axis=1))
    expected = {"cls": cls, "mean": mean, "cls+mean": np.concatenate([cls, mean], 1)}
    rows = tokens[:, 1:].reshape(3, *cfg.grid, -1)
    columns = cfg.grid[1]
    middle = rows[:, :, columns // 4 : columns - columns // 4].mean(axis=2)
    expected["stripes"] = unit(middle.reshape(3, -1))  # a stripe is one row here
    for feature, values in expected.items():
        got = extract(cfg, params, records, [0, 1, 2], feature=feature)
        np.testing.assert_allclose(got, values, **CLOSE)
        assert got.dtype == np.float32


def test_images_are_loaded_as_evaluation_reads_them(tmp_path):
    records = Pictures(3)
    files = [tmp_path / str(i) for i in range(3)]
    expected = np.empty((3, 16, 8, 3), np.uint8)
    for file, data, row in zip(files, records.files, expected, strict=True):
        file.write_bytes(data)
        image, _ = images.decode(data, max_pixels=10**6, min_side=1)
        images.crop_resize(image, Box(0, 0, 20, 10), row)
    np.testing.assert_array_equal(personmae_jax.load_images(files, 16, 8), expected)
    files[1].write_bytes(b"no image")
    with pytest.raises(RunError, match=f"{files[1]} cannot be used \\(.*not an image"):
        personmae_jax.load_images(files, 16, 8)


def test_every_feature_is_in_its_place_whatever_the_batch(cfg, params):
    records, indices = Pictures(13), [4, 0, 12, 3, 9, 1, 11, 5, 7, 2, 6]
    whole = extract(cfg, params, records, range(13), batch_size=16)
    for batch_size in (1, 8, 16):
        got = extract(cfg, params, records, np.array(indices), batch_size=batch_size)
        np.testing.assert_allclose(got, whole[indices], **CLOSE)


def test_one_device_makes_the_features_of_eight(cfg, params):
    records = Pictures(11)
    one = extract(cfg, params, records, range(11), devices=1, batch_size=4)
    eight = extract(cfg, params, records, range(11), devices=8)
    np.testing.assert_allclose(one, eight, **CLOSE)


def test_flip_adds_the_feature_of_the_mirror_image(cfg, params):
    pixels = np.stack([cv2.resize(x, (8, 16)) for x in Pictures(2).pixels])
    pixels, cameras = jax.numpy.asarray(pixels), jax.numpy.zeros(2, "int32")
    encode = make_encode(cfg.encoder, cfg.data)
    both = with_mirror_image(encode)
    plain = encode(params, pixels, cameras)
    mirrored = encode(params, pixels[:, :, ::-1], cameras)
    assert np.abs(plain - mirrored).max() > 0.01
    got = both(params, pixels, cameras)
    np.testing.assert_allclose(got, plain + mirrored, **CLOSE)


def test_each_image_comes_with_its_camera_and_its_change(cfg):
    """An `encode` that tells what it was given: a corner's pixel and the camera."""
    mesh, seen = sharding.make_mesh(), []

    def encode(params, pixels, cameras):
        seen.append(pixels.shape)
        values = (pixels[:, 0, 0, 0].astype("f4"), cameras.astype("f4"))
        return params + jax.numpy.stack(values, axis=1)

    def change(pixels, index):
        pixels[0, 0] = 100 + index

    extractor = Extractor(encode, cfg.data, mesh, 3)
    zero = sharding.replicate(np.zeros((1, 1), "f4"), mesh)
    indices, cameras = [7, 3, 9, 1, 0, 2, 5, 4, 8, 6], np.arange(10) + 50
    got = extractor(zero, Pictures(10), indices, cameras, change)
    expected = np.stack([100 + np.array(indices), cameras], axis=1)
    np.testing.assert_array_equal(got, expected)
    assert seen == [(8, 16, 8, 3)]  # rounded up to 8 devices, traced once
    without = extractor(zero, Pictures(10), indices, change=change)
    np.testing.assert_array_equal(without[:, 1], np.zeros(10))


def test_the_loop_may_ask_for_features(cfg, params):
    """Where transfers that nobody asked for are refused."""
    mesh = sharding.make_mesh()
    extractor = Extractor(make_encode(cfg.encoder, cfg.data), cfg.data, mesh, 8)
    params = sharding.replicate(params, mesh)
    with jax.transfer_guard("disallow"):
        assert extractor(params, Pictures(9), range(9)).shape == (9, 16)


@pytest.mark.parametrize("broken", [b"", b"no picture", OSError("gone")])
def test_an_image_that_cannot_be_used_is_named(cfg, params, broken, monkeypatch):
    records = Pictures(9)
    if isinstance(broken, OSError):
        whole = records.read

        def read(index):
            if index == 8:
                raise broken
            return whole(index)

        monkeypatch.setattr(records, "read", read)
    else:
        records.files[8] = broken
    with pytest.raises(RunError, match="picture 8 cannot be used") as caught:
        extract(cfg, params, records, range(9))
    assert "\n" not in str(caught.value)


def test_an_unknown_feature_is_refused(cfg):
    with pytest.raises(ConfigError, match="'cls-mean' is unknown; take cls, mean"):
        make_encode(cfg.encoder, cfg.data, "cls-mean")


def test_each_camera_loses_its_mean_unless_it_has_one_image():
    features = np.array([[1, 2], [3, 4], [10, 0], [5, 5]], np.float32)
    centred = camera_centred(features, np.array([0, 0, 1, 0]))
    expected = [[-2, -5 / 3], [0, 1 / 3], [10, 0], [2, 4 / 3]]
    np.testing.assert_allclose(centred, expected, rtol=1e-6)
    assert features[0, 0] == 1  # not changed in place
