"""The command that people type: exit codes, sentences, and what killing it leaves."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import personmae_jax
from personmae_jax.synthetic import pedestrian

ROOT = pathlib.Path(__file__).parents[2]
# Small enough for two cores, slow enough to be killed in the middle.
SMALL = (
    "--config.train.batch_size=48",
    "--config.train.steps=40",
    # By default the teacher of so short a run remembers nothing: it is the student.
    "--config.teacher.start_fraction=0.1",
    "--config.teacher.end_fraction=0.1",
    "--config.eval.every_steps=10",
    "--config.eval.identities=8",
)
TINY = (
    "--config.encoder.width=48",
    "--config.encoder.depth=2",
    "--config.pixel_predictor.width=48",
    "--config.train.batch_size=8",
    "--config.eval.every_steps=0",
)
# What differs between two runs of the same computation.
CLOCK = ("images_per_second", "data_seconds")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """Environment in which the second start does not compile again."""
    folder = tmp_path_factory.mktemp("cache")
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def environment(extra: dict[str, str]) -> dict[str, str]:
    """What a user has: no torch, no shortcuts such as conftest's when compiling."""
    inherited = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return inherited | {"PYTHONPATH": str(ROOT / "tests" / "without_torch")} | extra


def command(workdir, *overrides: str, config: str = "quickstart") -> list[str]:
    return [
        sys.executable,
        "launch/pretrain.py",
        f"--config=configs/{config}.py",
        f"--workdir={workdir}",
        *overrides,
    ]


def pretrain(
    workdir, *overrides: str, config: str = "quickstart", env: dict | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(workdir, *overrides, config=config),
        cwd=ROOT,
        env=environment(env or {"JAX_PLATFORMS": "cpu"}),
        capture_output=True,
        text=True,
        timeout=600,
    )


def start(workdir, *overrides: str, env: dict) -> subprocess.Popen:
    return subprocess.Popen(
        command(workdir, *overrides),
        cwd=ROOT,
        env=environment(env),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows(workdir) -> list[dict]:
    file = pathlib.Path(workdir) / "metrics.jsonl"
    if not file.exists():
        return []
    whole = file.read_text().rpartition("\n")[0]  # the last line may be torn
    return [json.loads(line) for line in whole.splitlines()]


def results(workdir) -> list[dict]:
    """Rows without the clock's readings."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows(workdir)]


def wait_for_step(process: subprocess.Popen, workdir, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in rows(workdir)):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_refused(process: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 2, and nothing on stderr but sentences that hold these words."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert word in process.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = pretrain(workdir, *SMALL, env=cache)
    assert process.returncode == 0, process.stderr
    return workdir


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


def test_run_killed_three_times_equals_uninterrupted(tmp_path, uninterrupted, cache):
    workdir, rng = tmp_path / "run", random.Random(0)
    for step in sorted(rng.sample(range(2, 36), 3)):
        process = start(workdir, *SMALL, "--config.checkpoint.every_steps=5", env=cache)
        wait_for_step(process, workdir, step)
        process.kill()
        process.communicate()
    assert rows(workdir)[-1]["step"] < 40
    process = pretrain(workdir, *SMALL, env=cache)
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in rows(workdir)] == list(range(41))
    assert results(workdir) == results(uninterrupted)
    assert len(rows(workdir)[-1]["params_sha256"]) == 64


def test_run_ended_by_sigterm_and_ctrl_c_equals_uninterrupted(
    tmp_path, uninterrupted, cache
):
    workdir = tmp_path / "run"
    for step, number in ((5, signal.SIGTERM), (15, signal.SIGINT)):
        process = start(workdir, *SMALL, env=cache)
        wait_for_step(process, workdir, step)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 75, stderr
        # Nothing is lost: the step that was shown last is saved.
        assert (workdir / "checkpoints" / str(rows(workdir)[-1]["step"])).is_dir()
    assert pretrain(workdir, *SMALL, env=cache).returncode == 0
    assert results(workdir) == results(uninterrupted)


def test_finished_run_has_its_last_picture(uninterrupted):
    assert (uninterrupted / "pictures" / "40.png").stat().st_size > 10_000


def test_finished_run_started_again_says_so(uninterrupted, cache):
    before = results(uninterrupted)
    process = pretrain(uninterrupted, *SMALL, env=cache)
    assert process.returncode == 0
    assert "finished" in process.stdout
    assert results(uninterrupted) == before


def test_other_settings_in_the_same_workdir_are_refused_by_name(uninterrupted):
    process = pretrain(uninterrupted, *SMALL, "--config.encoder.depth=5")
    assert_refused(process, "encoder.depth: 4 there, 5 here")


def test_second_run_in_the_same_workdir_is_refused(tmp_path, cache):
    workdir = tmp_path / "run"
    first = start(workdir, *SMALL, "--config.train.steps=4000", env=cache)
    wait_for_step(first, workdir, 1)
    try:
        assert_refused(
            pretrain(workdir, *SMALL, "--config.train.steps=4000", env=cache),
            str(first.pid),
        )
    finally:
        first.kill()
        first.communicate()


def test_non_finite_loss_stops_the_run_and_leaves_good_checkpoints(tmp_path, cache):
    process = pretrain(
        tmp_path / "run",
        *TINY,
        "--config.optim.base_lr=2e9",
        "--config.optim.warmup=0",
        "--config.checkpoint.every_steps=1",
        env=cache,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "error: step " in process.stderr
    params, _ = personmae_jax.load_encoder(str(tmp_path / "run"))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def make_folder(folder: pathlib.Path, num_good: int, num_bad: int) -> None:
    folder.mkdir()
    for i in range(num_good):
        (folder / f"{i}.jpg").write_bytes(pedestrian.encode_pedestrian(0, i, 0, 0))
    for i in range(num_bad):
        (folder / f"bad{i}.jpg").write_bytes(b"no picture")


def test_resuming_with_other_data_is_refused(tmp_path, cache):
    make_folder(tmp_path / "images", num_good=12, num_bad=0)
    words = (
        *TINY,
        "--config.train.steps=2",
        "--config.data.source=folder",
        f"--config.data.path={tmp_path / 'images'}",
    )
    assert pretrain(tmp_path / "run", *words, env=cache).returncode == 0
    more = pedestrian.encode_pedestrian(0, 99, 0, 0)
    (tmp_path / "images" / "more.jpg").write_bytes(more)
    process = pretrain(tmp_path / "run", *words, env=cache)
    assert_refused(process, "13 records", "12 records", "--workdir")


def test_bad_images_are_replaced_counted_and_named(tmp_path, cache):
    make_folder(tmp_path / "images", num_good=12, num_bad=2)
    process = pretrain(
        tmp_path / "run",
        *TINY,
        "--config.train.steps=4",
        "--config.data.source=folder",
        f"--config.data.path={tmp_path / 'images'}",
        "--config.data.max_bad_fraction=0.2",
        env=cache,
    )
    assert process.returncode == 0, process.stderr
    # 4 batches of 8 go twice through 14 images: each bad one is met at least twice.
    assert sum(row["bad_images"] for row in rows(tmp_path / "run")) >= 4
    assert "bad0.jpg" in process.stderr
    assert "bad1.jpg" in process.stderr


def test_too_many_bad_images_stop_the_run_with_the_list(tmp_path, cache):
    make_folder(tmp_path / "images", num_good=12, num_bad=2)
    process = pretrain(
        tmp_path / "run",
        *TINY,
        "--config.data.source=folder",
        f"--config.data.path={tmp_path / 'images'}",
        env=cache,
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    error = process.stderr[process.stderr.index("error:") :]
    assert "max_bad_fraction" in error
    assert ".jpg" in error


def test_load_encoder_gives_the_tokens_of_a_run(uninterrupted):
    params, apply = personmae_jax.load_encoder(str(uninterrupted))
    untrained, _ = personmae_jax.load_encoder(str(uninterrupted), step=0)
    teacher, _ = personmae_jax.load_encoder(str(uninterrupted), weights="teacher")
    images = np.random.default_rng(0).integers(0, 256, (2, 128, 64, 3)).astype(np.uint8)
    tokens = [np.asarray(apply(p, images)) for p in (params, untrained, teacher)]
    assert tokens[0].shape == (2, 1 + 32, 128)
    assert all(np.isfinite(t).all() for t in tokens)
    assert not np.allclose(tokens[0], tokens[1], atol=1e-3)
    assert not np.allclose(tokens[0], tokens[2], atol=1e-6)
    with pytest.raises(ValueError, match="uint8 RGB"):
        apply(params, images[:, :64])


def test_quickstart_learns_in_60_steps(tmp_path, cache):
    process = pretrain(
        tmp_path / "run",
        "--config.train.steps=60",
        "--config.train.batch_size=32",
        env=cache,
    )
    assert process.returncode == 0, process.stderr
    losses = [row["pixel_loss"] for row in rows(tmp_path / "run")[1:]]
    assert losses[0] == pytest.approx(1.0, abs=0.02)
    assert losses[-1] < 0.95
    for name in ("pixel_loss", "retrieval_mAP", "occluded_mAP"):  # the summary
        assert re.search(rf"\n  {name} +0\.\d\d\d -> 0\.\d\d\d\n", process.stdout)


@pytest.mark.slow
def test_vitb_trains_two_steps_in_under_8_gib(tmp_path, cache):
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
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]
    peak_kib = int(process.stdout.splitlines()[-1])
    assert peak_kib < 8 * 2**20
