"""The command that people type: its exit codes and sentences, and what it leaves."""

import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from launching import (
    ROOT,
    TINY,
    assert_refused,
    command,
    environment,
    make_folder,
    pretrain,
    rows,
)
from workdir_test import open_workdir

import personmae_jax
from personmae_jax.config import Config
from personmae_jax.synthetic import pedestrian


def test_vitb_without_data_is_refused_in_one_line_before_device_work(tmp_path):
    no_device = {"JAX_PLATFORMS": "none_such"}
    process = pretrain(tmp_path / "run", config="vitb", env=no_device)
    assert_refused(
        process,
        "--config.data.path",
        "launch/prepare_data.py",
        "configs/quickstart.py",
    )
    assert len(process.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.optim.base_rl=1e-4", ["--config.optim.base_lr"]),
        ("--config.batch_size=8", ["--config.train.batch_size"]),
        ("--config.train.steps=many", ["train.steps", "many"]),
        ("--config.data.source=synthetik", ["did you mean", "synthetic"]),
        ("--config.masks.ratio=1.5", ["masks.ratio", "0 .. 1"]),
        ("--config.data.source=folder", ["--config.data.path"]),
        ("--wrkdir=x", ["workdir"]),
        ("nonsense", ["nonsense"]),
    ],
)
def test_wrong_setting_is_refused_with_the_nearest_right_name(tmp_path, flag, words):
    assert_refused(pretrain(tmp_path / "run", flag), *words)
    assert not (tmp_path / "run").exists()


def test_missing_or_broken_config_file_is_refused(tmp_path):
    assert_refused(pretrain(tmp_path / "run", config="none_such"), "none_such")
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    process = pretrain(tmp_path / "run", f"--config={tmp_path}/broken.py")
    assert_refused(process, "SyntaxError")


def test_second_run_in_the_same_workdir_is_refused(tmp_path):
    with open_workdir(tmp_path, Config()):  # this process is the first
        assert_refused(pretrain(tmp_path, *TINY), f"process {os.getpid()}")


def test_non_finite_loss_stops_the_run_and_leaves_good_checkpoints(tmp_path, cache):
    process = pretrain(
        tmp_path / "run",
        *TINY,
        "--config.optim.lr=1e8",
        "--config.optim.warmup=0",
        "--config.checkpoint.every_steps=1",
        env=cache,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "error: step " in process.stderr
    params, _ = personmae_jax.load_encoder(str(tmp_path / "run"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


@pytest.fixture(scope="module")
def some_bad(tmp_path_factory, cache):
    """A run over 14 images, two of them bad, what it said and how it was started."""
    folder = tmp_path_factory.mktemp("some_bad")
    make_folder(folder / "images", num_good=12, num_bad=2)
    words = (
        *TINY,
        "--config.train.steps=4",
        "--config.data.source=folder",
        f"--config.data.path={folder / 'images'}",
    )
    few = "--config.data.max_bad_fraction=0.2"
    return folder, pretrain(folder / "run", *words, few, env=cache), words


def test_bad_images_are_replaced_counted_and_named(some_bad):
    folder, process, _ = some_bad
    assert process.returncode == 0, process.stderr
    # 4 batches of 8 go twice through 14 images: each bad one is met at least twice.
    assert sum(row["bad_images"] for row in rows(folder / "run")) >= 4
    assert "bad0.jpg" in process.stderr
    assert "bad1.jpg" in process.stderr


def test_too_many_bad_images_stop_the_run_with_the_list(some_bad, tmp_path, cache):
    process = pretrain(tmp_path / "run", *some_bad[2], env=cache)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    error = process.stderr[process.stderr.index("error:") :]
    assert "max_bad_fraction" in error
    assert ".jpg" in error


def test_resuming_with_other_data_is_refused(some_bad, cache):
    folder, _, words = some_bad
    more = folder / "images" / "more.jpg"
    more.write_bytes(pedestrian.encode_pedestrian(0, 99, 0, 0))
    few = "--config.data.max_bad_fraction=0.2"
    process = pretrain(folder / "run", *words, few, env=cache)
    more.unlink()
    assert_refused(process, "15 records", "14 records", "--workdir")


def test_quickstart_learns_in_60_steps(tmp_path):
    process = pretrain(
        tmp_path / "run",
        "--config.train.steps=60",
        "--config.train.batch_size=32",
        "--config.eval.identities=32",
    )
    assert process.returncode == 0, process.stderr
    losses = [row["pixel_loss"] for row in rows(tmp_path / "run")[1:]]
    assert losses[0] == pytest.approx(1.0, abs=0.02)
    assert losses[-1] < 0.95
    for name in ("pixel_loss", "retrieval_mAP", "occluded_mAP"):  # the summary
        assert re.search(rf"\n  {name} +0\.\d\d\d -> 0\.\d\d\d\n", process.stdout)


@pytest.mark.slow
def test_vitb_trains_two_steps_in_under_8_gib(tmp_path):
    program = (
        "import resource, subprocess, sys; "
        "code = subprocess.run(sys.argv[1:]).returncode; "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    overrides = (
        "--config.data.source=synthetic",
        "--config.train.batch_size=4",
        "--config.train.steps=2",
    )
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            program,
            *command(tmp_path / "run", *overrides, config="vitb"),
        ],
        cwd=ROOT,
        env=environment({"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    peak_kib = int(process.stdout.splitlines()[-1])
    assert peak_kib < 8 * 2**20
