"""Promises about worker processes: none outlives its run, none leaves before it."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys

import pytest

# A run that has been told to stop and still takes batches, as when it saves.
_RUN = """
import signal
from absl import flags
from personmae_jax.config import Config
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import SyntheticRecords

flags.FLAGS.mark_as_parsed()
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)
cfg = Config()
cfg.data.height, cfg.data.width, cfg.train.batch_size = 32, 16, 2
cfg.data.num_threads, cfg.data.num_workers = 1, 2
for _ in PretrainBatches(SyntheticRecords(cfg.data.synthetic), cfg).iterate(0):
    print("batch", flush=True)
"""


@pytest.fixture
def run():
    with subprocess.Popen(
        [sys.executable, "-c", _RUN],
        cwd=pathlib.Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            assert process.stdout.readline() == "batch\n", process.stderr.read()
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_workers_end_with_a_run_that_is_killed(run):
    run.kill()
    run.communicate(timeout=30)  # until nobody holds its end of the pipes


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_workers_outlive_a_signal_that_the_run_outlives(run, number):
    for _ in range(4):  # from both workers: they have finished importing
        assert run.stdout.readline() == "batch\n"
    os.killpg(run.pid, number)
    for _ in range(50):  # far more than were made ahead
        assert run.stdout.readline() == "batch\n"
    run.kill()
    _, stderr = run.communicate(timeout=30)
    assert "Traceback" not in stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_run_in_a_sentence(run):
    for _ in range(4):
        assert run.stdout.readline() == "batch\n"
    threads = pathlib.Path(f"/proc/{run.pid}/task").iterdir()
    for child in " ".join((t / "children").read_text() for t in threads).split():
        command = pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
        if b"spawn_main" in command:
            os.kill(int(child), signal.SIGKILL)  # as the kernel, out of memory
    error = run.communicate(timeout=60)[1]
    assert "RunError: a data worker was killed" in error
