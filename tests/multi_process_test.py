"""A run of two processes, as `launch/pretrain.py` starts on two hosts, on this one."""

import pathlib
import shutil

import pytest
from distributed_test import free_port
from launch_test import TINY, pretrain, rows, start

from personmae_jax.config import Config
from personmae_jax.data import synthetic
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import FolderRecords

# 6 batches of 8 are one epoch of 48 images: none is met twice.
NUM_IMAGES = 48
SETTINGS = (
    *TINY,
    "--config.train.steps=6",
    "--config.checkpoint.every_steps=3",
    "--config.data.source=folder",
    "--config.data.max_bad_fraction=0.1",
)
LOSSES = ("loss", "pixel_loss", "feature_loss", "grad_norm")


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("cache")),
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[str, str]:
    """The argument that names a folder, and its bad image, which only host 1 meets."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(NUM_IMAGES):
        (folder / f"{i}.jpg").write_bytes(synthetic.encode_pedestrian(0, i, 0, 0))
    records, cfg = FolderRecords(str(folder)), Config()
    # Row 1 of the first batch is the first row of host 1.
    bad = records.name(PretrainBatches(records, cfg).example(1).record)
    (folder / bad).write_bytes(b"no picture")
    return f"--config.data.path={folder}", bad


@pytest.fixture(scope="module")
def one(tmp_path_factory, images, env) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("one") / "run"
    process = pretrain(workdir, *SETTINGS, images[0], env=env)
    assert process.returncode == 0, process.stderr
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, images, env) -> tuple[pathlib.Path, list[str]]:
    """The workdir of two processes, and what each wrote to stderr."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    cluster = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        start(workdir, *SETTINGS, images[0], env=env | cluster | {"JAX_PROCESS_ID": i})
        for i in "01"
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    return workdir, said


def losses(workdir: pathlib.Path) -> list[float]:
    return [row[name] for row in rows(workdir) for name in LOSSES]


@pytest.mark.slow
def test_two_processes_train_as_one(one, two):
    # The sum over the batch is split in another place: float32 rounding.
    assert losses(two[0]) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.slow
def test_one_process_of_two_writes(two):
    workdir, _ = two
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in (workdir / "pictures").iterdir()] == ["6.png"]
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    steps = {folder.name for folder in (workdir / "checkpoints").iterdir()}
    assert steps == {"0", "3", "6"}


@pytest.mark.slow
def test_a_bad_image_of_another_host_is_counted(images, two):
    workdir, said = two
    assert [row["bad_images"] for row in rows(workdir)] == [1, 0, 0, 0, 0, 0]
    warning = f"replaced a bad image: {images[1]}"
    assert [warning in stderr for stderr in said] == [False, True]


@pytest.mark.slow
def test_one_process_resumes_what_two_have_saved(tmp_path, images, env, one, two):
    workdir = tmp_path / "run"
    shutil.copytree(two[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    process = pretrain(workdir, *SETTINGS, images[0], env=env)
    assert process.returncode == 0, process.stderr
    assert "from step 3 to step 6" in process.stdout
    assert losses(workdir) == pytest.approx(losses(one), rel=1e-5)
