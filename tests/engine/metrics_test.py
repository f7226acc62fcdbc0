import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import unittest.mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image
from tensorboardX.proto import event_pb2

from personmae_jax.engine import metrics
from personmae_jax.engine.metrics import MetricsWriter, params_sha256
from personmae_jax.errors import RunError

REPOSITORY = pathlib.Path(__file__).parents[2]


def open_writer(folder, start_step: int = 0) -> MetricsWriter:
    return MetricsWriter(epath.Path(folder), start_step)


def rows(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(constant)

    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder) -> list[event_pb2.Event]:
    """All TensorBoard events, file after file."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:  # 8 bytes length, 4 of its checksum, the event, 4 of its checksum
            length = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder) -> dict[tuple[str, int], float]:
    return {
        (value.tag, event.step): value.simple_value
        for event in events(folder)
        for value in event.summary.value
        if value.HasField("simple_value")
    }


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path):
    with open_writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": np.float32(0.5), "lr": jnp.float32(0.25)})
            assert rows(tmp_path)[-1] == {"step": step, "loss": 0.5, "lr": 0.25}
        writer.write(3, {"params_sha256": "ab", "bad_images": 7})
    assert rows(tmp_path)[2] == {"step": 3, "params_sha256": "ab", "bad_images": 7}


@pytest.mark.parametrize("value", [float("nan"), np.float32("inf"), jnp.float32("nan")])
def test_rows_are_strict_json_whatever_the_values(tmp_path, value):
    with open_writer(tmp_path) as writer:
        writer.write(1, {"loss": value})
    assert rows(tmp_path) == [{"step": 1, "loss": None}]


def test_scalars_and_pictures_are_in_tensorboard(tmp_path):
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    with open_writer(tmp_path) as writer:
        writer.write(5, {"loss": 0.5, "name": "x", "count": 3})
        writer.write_picture(5, picture)
    assert scalars(tmp_path) == {("loss", 5): 0.5, ("count", 5): 3.0}
    (image,) = [
        value.image
        for event in events(tmp_path)
        for value in event.summary.value
        if value.HasField("image")
    ]
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(shown, picture)
    stored = np.asarray(Image.open(tmp_path / "pictures" / "5.png"))
    np.testing.assert_array_equal(stored, picture)


GOOD = b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", b""),
        (GOOD, GOOD),
        (GOOD + b'{"step": 4}\n{"step": 5, "params_sha256": "x"}\n', GOOD),
        (GOOD + b'{"step": 4, "lo', GOOD),
        (GOOD + b'{"step": 3', GOOD),
        (GOOD + b"\x00\xff\xfe garbage\n\n[]\n{}\n" + b'{"step": "4"}\n', GOOD),
        (GOOD + b"[" * 100_000 + b"\n", GOOD),
        (GOOD + b"\xff" * (3 << 20), GOOD),
        (b'{"step": 4}\n', b""),
        (b"\xff\xff", b""),
        (b"\n\n\n", b""),
        (b"\xff torn before\n" + GOOD, GOOD),
    ],
)
def test_on_resume_rows_after_the_restored_step_and_torn_ones_go(
    tmp_path, content, expected
):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with open_writer(tmp_path, start_step=3) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes() == expected
        writer.write(4, {"loss": 1.0})
    text = (tmp_path / "metrics.jsonl").read_bytes()
    assert text == expected + b'{"step": 4, "loss": 1.0}\n'


def test_rows_are_read_whatever_stands_between_them(tmp_path):
    garbage = b"\xff\n[]\nnull\n" + b"[" * 100_000 + b"\n" + b"9" * 5000 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + garbage + b'{"step": 4, "lo')
    rows_read = metrics.read_rows(epath.Path(tmp_path))
    assert [row["step"] for row in rows_read] == [1, 2, 3]


def test_of_a_row_only_numbers_are_taken(tmp_path):
    row = b'{"step": 4, "loss": "abc", "list": [1], "yes": true, "x": null, "y": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(row)
    assert metrics.read_rows(epath.Path(tmp_path)) == [{"step": 4, "x": None, "y": 2}]


def test_what_a_link_points_to_is_never_written(tmp_path):
    """Neither rows nor pictures, nor what a file is called until it is whole."""
    run, mine = tmp_path / "run", tmp_path / "mine"
    (run / "pictures").mkdir(parents=True)
    mine.write_bytes(b"precious")
    for name in ("metrics.jsonl", "metrics.jsonl.part", "pictures/1.png"):
        (run / name).symlink_to(mine)
    with open_writer(run) as writer:
        writer.write(1, {"loss": 1.0})
        writer.write_picture(1, np.zeros((2, 2, 3), np.uint8))
    assert mine.read_bytes() == b"precious"
    assert rows(run) == [{"step": 1, "loss": 1.0}]


def test_a_pipe_in_place_of_the_rows_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match="is a pipe or a device"):
        open_writer(tmp_path)


def test_a_start_at_0_has_its_row_of_step_0_to_come_and_a_resumed_one_keeps_it(
    tmp_path,
):
    for start_step, steps in ((0, (0, 1)), (0, (0, 1, 2)), (1, (2,))):
        with open_writer(tmp_path, start_step) as writer:
            for step in steps:
                writer.write(step, {"loss": 0.0})
    assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2]


def test_on_resume_tensorboard_hides_what_was_logged_after_the_restored_step(tmp_path):
    # The first two starts were killed, one of them before its first checkpoint.
    for start_step, steps in ((0, (1, 2)), (0, (1, 2, 3)), (2, (3, 4))):
        with open_writer(tmp_path, start_step) as writer:
            for step in steps:
                writer.write(step, {"loss": float(start_step + step)})
    assert len(list((tmp_path / "tensorboard").iterdir())) == 3
    starts = [e for e in events(tmp_path) if e.HasField("session_log")]
    # TensorBoard drops what earlier files hold from this step on.
    assert [(e.step, e.session_log.status) for e in starts] == [(0, 1), (0, 1), (3, 1)]


@pytest.fixture
def object_storage(monkeypatch):
    """Treats every workdir as remote: whole files only."""
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)


@pytest.mark.usefixtures("object_storage")
def test_on_object_storage_whole_files_are_copied_now_and_then(tmp_path, clock):
    file = tmp_path / "metrics.jsonl"
    with open_writer(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
        assert not file.exists()
        clock.now += 31
        writer.write(2, {"loss": 2.0})
        assert [row["step"] for row in rows(tmp_path)] == [1, 2]
        clock.now += 29
        writer.write(3, {"loss": 3.0})
        assert len(rows(tmp_path)) == 2
        writer.flush()  # before a checkpoint
        assert len(rows(tmp_path)) == 3
        writer.write(4, {"loss": 4.0})
        local = writer._local
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    assert scalars(tmp_path)["loss", 4] == 4.0
    assert not local.exists()
    with open_writer(tmp_path, start_step=2) as writer:
        writer.write(3, {"loss": 3.5})
    assert [row["loss"] for row in rows(tmp_path)] == [1.0, 2.0, 3.5]


@pytest.mark.usefixtures("object_storage")
def test_a_copy_that_fails_is_made_up_for_but_not_at_the_end(
    tmp_path, clock, monkeypatch
):
    copy = metrics.copy_folder

    def fail(*_):
        raise OSError("storage is away")

    writer = open_writer(tmp_path)
    monkeypatch.setattr(metrics, "copy_folder", fail)
    clock.now += 31
    writer.write(1, {"loss": 1.0})
    monkeypatch.setattr(metrics, "copy_folder", copy)
    clock.now += 31
    writer.write(2, {"loss": 2.0})
    assert len(rows(tmp_path)) == 2
    monkeypatch.setattr(metrics, "copy_folder", fail)
    with pytest.raises(RunError, match="storage is away"):
        writer.close()


FILL_THE_DISK = """
import resource, sys
from etils import epath
from personmae_jax.errors import RunError
from personmae_jax.engine import metrics
metrics._FLUSH_EVERY = 0
writer = metrics.MetricsWriter(epath.Path(sys.argv[1]), 0)
writer.write(1, {"loss": 1.0})
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    with writer:
        for step in range(2, 99):
            writer.write(step, {"loss": 1.0})
except RunError as e:
    print(f"at step {step}: {e}", flush=True)
"""


# The first takes no more of the rows, the second of TensorBoard's events.
@pytest.mark.slow
@pytest.mark.parametrize(("limit", "step"), [(40, 2), (400, 8)])
def test_a_full_disk_ends_the_run_in_one_line_at_the_first_row_it_tears(
    tmp_path, limit, step
):
    done = subprocess.run(
        [sys.executable, "-c", FILL_THE_DISK, str(tmp_path), str(limit)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    )
    message = f"at step {step}: the metrics in .* cannot be written .*; fix that"
    assert re.search(message, done.stdout), done
    if limit == 40:
        assert (tmp_path / "metrics.jsonl").stat().st_size == 40


def test_params_sha256_is_the_hash_of_paths_and_bytes_in_order():
    params = {"b": {"x": jnp.ones(2)}, "a": jnp.zeros((1, 2), jnp.bfloat16)}
    expected = b"a bfloat16 (1, 2)\n" + bytes(4)
    expected += b"b/x float32 (2,)\n" + np.ones(2, np.float32).tobytes()
    assert params_sha256(params) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("num_devices", [1, 2, 8])
def test_params_sha256_is_equal_for_any_sharding(num_devices):
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    array = np.arange(64, dtype=np.float32).reshape(16, 4)
    for spec in (PartitionSpec("data"), PartitionSpec()):
        params = {"x": jax.device_put(array, NamedSharding(mesh, spec))}
        with jax.transfer_guard("disallow"):
            assert params_sha256(params) == params_sha256({"x": array})


def test_the_loop_s_guard_does_not_refuse_what_several_hosts_gather(monkeypatch):
    def gather(leaf, tiled):
        assert jax.config.jax_transfer_guard_device_to_host == "allow"
        return np.zeros(1)

    monkeypatch.setattr(multihost_utils, "process_allgather", gather)
    leaf = unittest.mock.Mock(spec=jax.Array)
    leaf.is_fully_addressable = leaf.is_fully_replicated = False
    with jax.transfer_guard("disallow"):
        assert params_sha256({"x": leaf}) == params_sha256({"x": np.zeros(1)})


@pytest.mark.parametrize(
    "other",
    [
        {"x": np.ones(4, np.float32), "z": np.zeros(2, np.float32)},
        {"x": np.ones((2, 2), np.float32), "y": np.zeros(2, np.float32)},
        {"x": np.ones(4, np.float32).view(np.int32), "y": np.zeros(2, np.float32)},
        {"x": np.ones(4, np.float32), "y": -np.zeros(2, np.float32)},
    ],
)
def test_params_sha256_tells_names_shapes_dtypes_and_bits_apart(other):
    params = {"x": np.ones(4, np.float32), "y": np.zeros(2, np.float32)}
    assert params_sha256(other) != params_sha256(params)
