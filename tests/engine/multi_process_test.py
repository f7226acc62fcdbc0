"""Runs of one and of two processes, as `launch/pretrain.py` starts on two hosts."""

import pathlib
import shutil
import signal
import sys
import time

import pytest
from hosts import GLOO, assert_all_end, start_hosts, with_devices
from launching import command, pretrain, rows, wait_for_step

from personmae_jax.config import Config
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import folder_records
from personmae_jax.synthetic import pedestrian

# 6 batches of 8 are one epoch of 48 images: none is met twice.
NUM_IMAGES = 48
SETTINGS = (
    # The MLP's matrices are just large enough to split.
    *("--config.encoder.width=64", "--config.encoder.depth=2"),
    *("--config.encoder.num_heads=2", "--config.encoder.patch_size=16"),
    "--config.pixel_predictor.width=48",
    "--config.pixel_predictor.memory_blocks=(0,-1)",
    "--config.feature_predictor.memory_blocks=(0,-1)",
    "--config.train.batch_size=8",
    "--config.train.steps=6",
    "--config.checkpoint.every_steps=3",
    "--config.data.source=folder",
    "--config.data.max_bad_fraction=0.1",
    "--config.eval.every_steps=3",
    "--config.eval.identities=8",
)
LOSSES = ("loss", "pixel_loss", "feature_loss", "grad_norm")


@pytest.fixture(scope="module")
def env(cache) -> dict[str, str]:
    return cache | GLOO


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[str, str]:
    """The argument that names a folder, and its bad image, which only host 1 meets."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        (folder / f"{i}.jpg").write_bytes(pedestrian.encode_pedestrian(0, i, 0, 0))
    records, cfg = folder_records(str(folder)), Config()
    # Row 1 of the first batch is the first row of host 1.
    bad = records.name(int(PretrainBatches(records, cfg).example(1).record))
    (folder / bad).write_bytes(b"no picture")
    return f"--config.data.path={folder}", bad


def two_processes(workdir, *settings: str, env: dict, num_devices: int):
    """Two processes of one run with so many devices each; killed when left."""
    return start_hosts(command(workdir, *settings), 2, with_devices(env, num_devices))


@pytest.fixture(scope="module")
def one(tmp_path_factory, images, env) -> pathlib.Path:
    """The workdir of one process with one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    process = pretrain(workdir, *SETTINGS, images[0], env=with_devices(env, 1))
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, images, env) -> dict[int, tuple[pathlib.Path, list[str]]]:
    """By fsdp: the workdir of two processes of two devices each, and what each said."""
    runs = {}
    for fsdp in (1, 2, 4):
        workdir = tmp_path_factory.mktemp("two") / "run"
        settings = (*SETTINGS, images[0], f"--config.mesh.fsdp={fsdp}")
        with two_processes(workdir, *settings, env=env, num_devices=2) as processes:
            said = assert_all_end(processes, 0)
        runs[fsdp] = workdir, said
    return runs


@pytest.fixture
def saved_by_two(tmp_path, two) -> pathlib.Path:
    """A copy of what two processes have saved at step 3, split over two devices."""
    workdir = tmp_path / "run"
    shutil.copytree(two[2][0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    return workdir


def losses(workdir: pathlib.Path) -> list[float]:
    return [row[name] for row in rows(workdir)[1:] for name in LOSSES]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_two_processes_train_as_one_whatever_the_mesh(one, two, fsdp):
    # The sum over the batch is split in another place: float32 rounding.
    assert losses(two[fsdp][0]) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_two_processes_score_a_retrieval_as_one(one, two, fsdp):
    scores, alone = rows(two[fsdp][0])[0], rows(one)[0]
    assert scores["retrieval_mAP"] > 0
    # Rounding may swap two neighbours of a ranking.
    assert scores == pytest.approx(alone, abs=0.02)


@pytest.mark.slow
def test_one_process_of_two_writes(two):
    workdir, _ = two[2]
    assert [row["step"] for row in rows(workdir)] == [0, 1, 2, 3, 4, 5, 6]
    pictures = {file.name for file in (workdir / "pictures").iterdir()}
    assert pictures == {"6.png", "curves.png"}
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    steps = {folder.name for folder in (workdir / "checkpoints").iterdir()}
    assert steps == {"0", "3", "6"}


@pytest.mark.slow
def test_a_bad_image_of_another_host_is_counted(images, two):
    workdir, said = two[2]
    assert [row["bad_images"] for row in rows(workdir)[1:]] == [1, 0, 0, 0, 0, 0]
    warning = f"replaced a bad image: {images[1]}"
    assert [warning in stderr for stderr in said] == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize(("num_devices", "fsdp"), [(1, 1), (8, 4)], ids=["1x1", "1x8"])
def test_one_process_resumes_what_two_have_saved(
    saved_by_two, images, env, one, num_devices, fsdp
):
    process = pretrain(
        saved_by_two,
        *SETTINGS,
        images[0],
        f"--config.mesh.fsdp={fsdp}",
        env=with_devices(env, num_devices),
    )
    assert process.returncode == 0, process.stderr
    assert "from step 3 to step 6" in process.stdout
    assert losses(saved_by_two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
def test_twice_as_many_devices_resume_what_four_have_saved(
    saved_by_two, images, env, one
):
    settings = (*SETTINGS, images[0], "--config.mesh.fsdp=4")
    with two_processes(saved_by_two, *settings, env=env, num_devices=4) as processes:
        assert_all_end(processes, 0)
    assert losses(saved_by_two) == pytest.approx(losses(one), rel=1e-5)


LONG = (
    "--config.train.steps=100000",
    "--config.log.every_steps=1",
    "--config.checkpoint.every_steps=100000",
    "--config.eval.every_steps=0",
)


@pytest.mark.slow
def test_a_sigterm_to_one_process_makes_both_save_the_same_step(tmp_path, images, env):
    settings = (*SETTINGS, *LONG, images[0], "--config.mesh.fsdp=2")
    with two_processes(tmp_path, *settings, env=env, num_devices=2) as processes:
        wait_for_step(processes[0], tmp_path, 3)
        processes[1].send_signal(signal.SIGTERM)
        assert_all_end(processes, 75, timeout=120)
    last = max(int(folder.name) for folder in (tmp_path / "checkpoints").iterdir())
    assert rows(tmp_path)[-1]["step"] == last


@pytest.mark.slow
def test_the_workdir_of_another_run_is_refused_without_waiting(one, images, env):
    settings = (*SETTINGS, images[0], "--config.train.seed=7")
    with two_processes(one, *settings, env=env, num_devices=1) as processes:
        stderr = processes[0].communicate(timeout=90)[1]
        processes[1].wait(timeout=60)
    assert processes[0].returncode == 2
    assert "config.train.seed: 0 there, 7 here" in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (("--config.train.seed=7",), "config.train.seed: 0 there, 7 here"),
        (("--config.data.path=FEWER",), f"data of {NUM_IMAGES} records"),
    ],
    ids=["settings", "data"],
)
def test_processes_that_would_train_different_things_are_refused(
    tmp_path, images, env, settings, told
):
    (tmp_path / "fewer").mkdir()
    for i in range(NUM_IMAGES - 1):
        image = pedestrian.encode_pedestrian(0, i, 0, 0)
        (tmp_path / "fewer" / f"{i}.jpg").write_bytes(image)
    run = command(tmp_path / "run", *SETTINGS, images[0])
    other = [word.replace("FEWER", f"{tmp_path / 'fewer'}") for word in settings]
    with start_hosts(run, 2, with_devices(env, 1), [[], other]) as processes:
        said = assert_all_end(processes, 2)
    assert all("process 1 of this run has other" in x and told in x for x in said)
    assert not (tmp_path / "run").exists()


JOIN = """
import sys
from personmae_jax.engine import distributed

flags = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
distributed.initialize(
    flags["coordinator"], int(flags["num_processes"]), int(flags["process_id"])
)
"""

# Process 1 is given a folder of its own, as on a disk that hosts do not share.
APART = (
    JOIN
    + """
import jax
import numpy as np
import pytest
from etils import epath
from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.engine import workdir
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.errors import ConfigError, RunError

mesh, process = sharding.make_mesh(), jax.process_index()
shared, apart = (epath.Path(f"{flags['folder']}/{name}") for name in ("run", "other"))
state = sharding.replicate({"x": np.arange(3.0, dtype=np.float32)}, mesh)
with Checkpoints(shared, keep=1, config={}) as checkpoints:
    checkpoints.save(3, state)
if process == 1:  # as on a network disk whose listing is late

    def iterdir(folder, *_):
        return iter(())

    type(shared).iterdir = type(shared).glob = iterdir
with Checkpoints(shared, keep=1, config={}) as checkpoints:
    assert checkpoints.latest_step() == 3
workdir._VISIBLE = 1.0
if process == 0:
    held = workdir.Workdir(shared, Config()).__enter__()
workdir.check_processes_share(shared)
with pytest.raises(ConfigError, match="process 1 does not see what process 0"):
    workdir.check_processes_share(apart if process else shared)
with pytest.raises(RunError, match="have read other parameters than each other"):
    sharding.replicate(np.float32(process), mesh)
with jax.transfer_guard("disallow"):
    whole = sharding.replicate(np.arange(6, dtype=np.int32).reshape(3, 2), mesh)
assert np.asarray(whole).tolist() == [[0, 1], [2, 3], [4, 5]]
"""
)


@pytest.mark.slow
def test_what_processes_must_have_in_common_is_looked_at(tmp_path, env):
    run = [sys.executable, "-c", APART, f"--folder={tmp_path}"]
    with start_hosts(run, 2, with_devices(env, 2)) as processes:
        assert_all_end(processes, 0)


FEATURES = (
    JOIN
    + """
import cv2
import jax
import jax.numpy as jnp
import numpy as np
from personmae_jax import sharding
from personmae_jax.config import ImageConfig
from personmae_jax.reid.features import Extractor


class Grey:
    def __len__(self):
        return 20

    def name(self, i):
        return str(i)

    def read(self, i):
        return cv2.imencode(".png", np.full((16, 16, 3), i, np.uint8))[1].tobytes()


mesh = sharding.make_mesh()
devices = mesh.devices.ravel()[[0, 2, 3, 1]]  # as a TPU's links might have it
assert [d.process_index for d in devices] == [0, 1, 1, 0]
mesh = jax.sharding.Mesh(devices.reshape(4, 1), mesh.axis_names, mesh.axis_types)
zero = sharding.replicate(np.float32(0), mesh)
extract = Extractor(
    lambda zero, images, cameras: jnp.stack([images[:, 0, 0, 0] + zero, cameras], 1),
    *(ImageConfig(height=16, width=16), mesh, 8),
)
with jax.transfer_guard("disallow"):
    found = extract(zero, Grey(), range(20), range(100, 120))
np.testing.assert_array_equal(found[:, 0], np.arange(20))
np.testing.assert_array_equal(found[:, 1], np.arange(100, 120))
"""
)


@pytest.mark.slow
def test_a_feature_is_of_its_image_whatever_the_order_of_the_hosts_devices(env):
    run = [sys.executable, "-c", FEATURES]
    with start_hosts(run, 2, with_devices(env, 2)) as processes:
        assert_all_end(processes, 0)


FULL_DISK = (
    JOIN
    + """
import os
import jax
import numpy as np
from etils import epath
from personmae_jax import sharding
from personmae_jax.engine import checkpoint, checkpoint_files
from personmae_jax.errors import RunError


def fail(self, directory):
    raise OSError(28, "No space left on device")


checkpoint_files.HashedState.finalize = fail
state = {"params": sharding.replicate(np.ones((64, 64)), sharding.make_mesh())}
checkpoints = checkpoint.Checkpoints(epath.Path(flags["folder"]), keep=1, config={})
try:
    checkpoints.save(1, state)
    checkpoints.wait()
except RunError as error:
    assert "No space left" in str(error) and jax.process_index() == 0
    os._exit(3)
"""
)


@pytest.mark.slow
def test_a_save_that_process_0_cannot_finish_holds_nobody(tmp_path, env):
    """Orbax waits at a barrier, 20 minutes, for the others, who wait for the save."""
    run = [sys.executable, "-c", FULL_DISK, f"--folder={tmp_path}"]
    with start_hosts(run, 2, with_devices(env, 1)) as processes:
        processes[0].communicate(timeout=100)
        assert processes[0].returncode == 3
        processes[1].communicate(timeout=150)  # ends with it


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_ends_with_an_error(
    tmp_path, images, env, victim
):
    settings = (*SETTINGS, *LONG, images[0], "--config.mesh.fsdp=2")
    with two_processes(tmp_path, *settings, env=env, num_devices=2) as processes:
        wait_for_step(processes[0], tmp_path, 3)
        processes[victim].kill()
        began = time.monotonic()
        _, stderr = processes[1 - victim].communicate(timeout=200)
    assert time.monotonic() - began < 150  # jax's heartbeats find it after 100 s
    # 1 by our sentence; jax's own service aborts where it is the first to notice.
    assert processes[1 - victim].returncode in (1, -signal.SIGABRT)
    assert "has died or cannot be reached" in stderr or "another task died" in stderr
