"""Promises about batches: a function of (seed, step, host), whatever the pictures."""

import pickle
import threading
import time

import numpy as np
import pytest
import simplejpeg
from image_files import encode
from PIL import Image

from personmae_jax.config import Config
from personmae_jax.data import images, regions
from personmae_jax.data.images import Outcome
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import folder_records
from personmae_jax.errors import RunError

_BATCH = 8


class _Memory:
    """Encoded images in a list; an exception in it is raised by `read`."""

    def __init__(self, contents):
        self.contents = contents

    def __len__(self):
        return len(self.contents)

    def read(self, index):
        if isinstance(self.contents[index], Exception):
            raise self.contents[index]
        return self.contents[index]

    def name(self, index):
        return f"picture {index}"


def _pixels(seed, height=40, width=24):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _pictures(num=20):
    return [simplejpeg.encode_jpeg(_pixels(i, 40 + i, 24)) for i in range(num)]


def _config(*, seed=0, threads=2, workers=0):
    cfg = Config()
    cfg.encoder.patch_size = 4
    cfg.data.height, cfg.data.width = 32, 16
    cfg.data.num_threads, cfg.data.num_workers = threads, workers
    cfg.train.batch_size, cfg.train.seed = _BATCH, seed
    return cfg


def _batches(contents=None, **options):
    contents = _pictures() if contents is None else contents
    return PretrainBatches(_Memory(contents), _config(**options))


def _take(batches, start, stop):
    iterator = batches.iterate(start, stop)
    try:
        return list(iterator)
    finally:
        iterator.close()


def _assert_equal(batch, other):
    assert batch.keys() == other.keys()
    for key in batch:
        assert batch[key].dtype == other[key].dtype
        np.testing.assert_array_equal(batch[key], other[key], err_msg=key)


def test_a_batch_has_the_documented_arrays():
    batch = _batches()[3]
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items()}
    assert shapes == {
        "region_a": ((_BATCH, 32, 16, 3), "uint8"),
        "region_b": ((_BATCH, 32, 16, 3), "uint8"),
        "visible": ((_BATCH, 16), "int32"),
        "geometry": ((_BATCH, 4), "float32"),
        "record": ((_BATCH,), "int64"),
        "outcome": ((_BATCH,), "int8"),
    }
    assert not batch["outcome"].any()


def test_iterating_gives_the_batches_in_order_for_any_number_of_threads():
    expected = [_batches()[step] for step in range(2, 9)]
    for threads in (1, 3, 16):
        batches = _take(_batches(threads=threads), 2, 9)
        assert len(batches) == 7
        for batch, other in zip(batches, expected, strict=True):
            _assert_equal(batch, other)


def test_worker_processes_do_not_change_the_batches():
    for batch, other in zip(
        _take(_batches(workers=2), 1, 6), _take(_batches(), 1, 6), strict=True
    ):
        _assert_equal(batch, other)


@pytest.mark.parametrize("num_hosts", [1, 2, 4])
def test_hosts_share_out_the_rows_of_one_global_batch(num_hosts):
    records, cfg = _Memory(_pictures()), _config()
    whole = PretrainBatches(records, cfg)[5]
    for host in range(num_hosts):
        part = PretrainBatches(records, cfg, host=host, num_hosts=num_hosts)[5]
        _assert_equal(part, {key: whole[key][host::num_hosts] for key in whole})


def test_starting_at_a_step_equals_the_tail():
    whole = _take(_batches(), 0, 7)
    for batch, other in zip(_take(_batches(), 4, 7), whole[4:], strict=True):
        _assert_equal(batch, other)


def test_every_epoch_is_another_permutation_of_all_records():
    batches = _batches()
    order = np.concatenate([batches[step]["record"] for step in range(15)])
    epochs = order[:120].reshape(6, 20)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    assert len(np.unique(epochs, axis=0)) == 6


def test_an_epoch_may_be_shorter_than_a_batch():
    order = _batches(_pictures(3))[0]["record"]
    np.testing.assert_array_equal(np.sort(order[:3]), np.arange(3))
    np.testing.assert_array_equal(np.sort(order[3:6]), np.arange(3))


def test_seeds_and_positions_draw_differently():
    batch, other = _batches(seed=0)[0], _batches(seed=1)[0]
    assert (batch["record"] != other["record"]).any()
    assert (batch["visible"] != other["visible"]).any()
    assert (batch["geometry"] != other["geometry"]).any()
    rows = np.concatenate([_batches()[step]["geometry"] for step in range(20)])
    assert len(np.unique(rows, axis=0)) == len(rows)


def test_an_example_is_the_row_and_shows_where_it_was_cut():
    batches = _batches()
    batch = batches[2]
    flipped = 0
    for row in range(_BATCH):
        example = batches.example(2 * _BATCH + row)
        for key in batch:
            np.testing.assert_array_equal(getattr(example, key), batch[key][row])
        for box, region in (
            (example.box_a, example.region_a),
            (example.box_b, example.region_b),
        ):
            cut = np.empty_like(region)
            images.crop_resize(example.image, box, cut)
            np.testing.assert_array_equal(cut, region)
        np.testing.assert_array_equal(
            regions.relative_geometry(example.box_a, example.box_b, (8, 4)),
            example.geometry,
        )
        upright, _ = images.decode(
            _pictures()[example.record], max_pixels=10**6, min_side=8
        )
        is_flipped = (example.image != upright).any()
        flipped += is_flipped
        np.testing.assert_array_equal(
            example.image, upright[:, ::-1] if is_flipped else upright
        )
    assert 0 < flipped < _BATCH


def test_one_flip_is_shared_by_both_regions():
    ramp = np.linspace(0, 255, 24).astype(np.uint8)  # brighter to the right
    content = encode(np.broadcast_to(ramp[:, None], (40, 24, 3)), "PNG")
    batches = _batches([content])
    rows = [batches[step] for step in range(4)]

    def is_flipped(name):
        regions = np.concatenate([batch[name] for batch in rows]).astype(float)
        return regions[:, :, 0].mean((1, 2)) > regions[:, :, -1].mean((1, 2))

    np.testing.assert_array_equal(is_flipped("region_a"), is_flipped("region_b"))
    assert 0 < is_flipped("region_a").sum() < 4 * _BATCH


def _bad_contents():
    """One picture of every kind of trouble, with what becomes of it."""
    jpeg = _pictures(1)[0]
    frames = [Image.fromarray(_pixels(9))]
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = np.arange(40 * 24, dtype=np.uint16).reshape(40, 24) * 60
    return [
        (jpeg[: len(jpeg) // 2], Outcome.TRUNCATED),
        (b"", Outcome.EMPTY),
        (b"text, though the file is named .jpg", Outcome.NOT_AN_IMAGE),
        (encode(_pixels(0, 1, 1), "PNG"), Outcome.TOO_SMALL),
        (encode(np.zeros((5000, 5000), np.uint8), "PNG", "1"), Outcome.TOO_LARGE),
        (PermissionError(13, "Permission denied"), Outcome.UNREADABLE),
        (encode(_pixels(1), "JPEG", "L"), Outcome.GREYSCALE),
        (encode(_pixels(2), "JPEG", "CMYK"), Outcome.CMYK),
        (encode(deep, "PNG"), Outcome.SIXTEEN_BIT),
        (encode(_pixels(3), "JPEG", exif=exif), Outcome.ROTATED),
        (
            encode(_pixels(4), "GIF", save_all=True, append_images=frames),
            Outcome.ANIMATED,
        ),
    ]


@pytest.mark.parametrize(
    ("content", "outcome"), [pytest.param(*c, id=c[1].name) for c in _bad_contents()]
)
def test_a_bad_record_is_replaced_by_the_next_and_nothing_else_changes(
    content, outcome
):
    contents = _pictures()
    cfg = _config()
    cfg.data.max_pixels = 10**7
    good = PretrainBatches(_Memory(contents), cfg)
    mixed = PretrainBatches(_Memory([*contents[:7], content, *contents[8:]]), cfg)
    # Where the rule puts record 8 in the place of record 7.
    replaced = PretrainBatches(
        _Memory([*contents[:7], contents[8], *contents[8:]]), cfg
    )
    for step in range(3):
        batch, other = mixed[step], good[step]
        is_hit = other["record"] == 7
        expected = np.where(is_hit, outcome, Outcome.PLAIN)
        np.testing.assert_array_equal(batch["outcome"], expected)
        for key in ("record", "visible"):
            np.testing.assert_array_equal(batch[key], other[key])
        for key in ("region_a", "region_b", "geometry"):
            np.testing.assert_array_equal(batch[key][~is_hit], other[key][~is_hit])
            if outcome.is_bad:
                np.testing.assert_array_equal(batch[key], replaced[step][key])


def test_the_last_record_is_replaced_by_the_first_usable_one():
    contents = [b"", *_pictures()[1:19], b""]
    usable = [_pictures()[1], *_pictures()[1:19], _pictures()[1]]
    for step in range(3):
        np.testing.assert_array_equal(
            _batches(contents)[step]["region_a"], _batches(usable)[step]["region_a"]
        )


def test_an_unreadable_file_is_replaced(tmp_path):
    for index, content in enumerate(_pictures(6)):
        (tmp_path / f"{index}.jpg").write_bytes(content)
    (tmp_path / "3.jpg").unlink()
    (tmp_path / "3.jpg").symlink_to(tmp_path / "gone.jpg")
    batch = PretrainBatches(folder_records(str(tmp_path)), _config())[0]
    is_hit = batch["record"] == 3
    assert is_hit.any()
    np.testing.assert_array_equal(
        batch["outcome"], np.where(is_hit, Outcome.UNREADABLE, Outcome.PLAIN)
    )


def test_nothing_usable_ends_the_run_and_names_the_pictures():
    for num in (3, 300):
        with pytest.raises(RunError, match=r"picture \d+ \(empty\)") as caught:
            _batches([b""] * num)[0]
        assert f"{min(num, 101)} images in a row" in str(caught.value)


def test_a_folder_that_vanishes_is_called_gone(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for index, content in enumerate(_pictures(6)):
        (folder / f"{index}.jpg").write_bytes(content)
    cfg = _config()
    cfg.data.path = str(folder)
    batches = PretrainBatches(folder_records(str(folder)), cfg)
    batches[0]
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"data' is gone; mount it"):
        batches[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_reaches_the_consumer_as_itself(workers):
    contents = _pictures()
    contents[11] = ZeroDivisionError("a bug in a source")
    iterator = _batches(contents, workers=workers).iterate(0, 100)
    try:
        with pytest.raises(ZeroDivisionError, match="a bug in a source"):
            list(iterator)
    finally:
        iterator.close()


def test_closing_ends_all_threads():
    before = set(threading.enumerate())
    batches = _batches(threads=4)
    for num_taken in (0, 1, 3):
        iterator = batches.iterate(0)
        for _ in range(num_taken):
            next(iterator)
        iterator.close()
        iterator.close()  # harmless
    deadline = time.monotonic() + 20
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        for thread in set(threading.enumerate()) - before:
            thread.join(timeout=1)
    assert not set(threading.enumerate()) - before
    batches[0]  # closing an iterator leaves the batches usable


def test_few_batches_are_held_however_slow_the_consumer():
    class Counting(_Memory):
        num_read = 0

        def read(self, index):
            self.num_read += 1
            return super().read(index)

    records = Counting(_pictures())
    iterator = PretrainBatches(records, _config(threads=1)).iterate(0)
    try:
        next(iterator)
        for _ in range(50):  # each lets the only thread do all that is queued
            iterator._batches._pool.submit(lambda: None).result()
        # One was taken, two are made ahead, and one may be just beginning.
        assert records.num_read <= 4 * _BATCH
    finally:
        iterator.close()


def test_batches_survive_pickling():
    batches = _batches()
    batches[0]
    _assert_equal(pickle.loads(pickle.dumps(batches))[1], batches[1])
