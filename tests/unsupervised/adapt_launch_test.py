"""Promises of the command: a run stopped in mid-round goes on, and its exit codes."""

import pathlib
import signal
import sys

import jax
import numpy as np
import pytest
from hosts import assert_all_end, start_hosts, with_devices
from launching import rows, wait_for_step
from unlabelled import SMALL, last_state

IN_ROUND = 200  # steps
CLOCK = ("images_per_second", "data_seconds", "cluster_seconds")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def env(cache) -> dict[str, str]:
    return with_devices(cache, 1)


def adapting(workdir, *settings: str, env: dict):
    """A process of the command; killed when left."""
    words = (f"--workdir={workdir}", *SMALL, "--config.eval.every_rounds=0")
    rounds = ("--config.train.rounds=2", f"--config.train.steps_per_round={IN_ROUND}")
    command = [sys.executable, "launch/adapt.py", *words, *rounds, *settings]
    return start_hosts(command, 1, env)


def results(workdir: pathlib.Path) -> list[dict]:
    """Rows without the clock's readings."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows(workdir)]


def test_a_run_stopped_by_a_signal_in_mid_round_goes_on_to_the_bit(tmp_path, env):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with adapting(whole, env=env) as started:
        assert_all_end(started, 0)
    # jax looks for signals once a second, which steps alone would not fill.
    slow = "--config.checkpoint.every_steps=1"
    with adapting(stopped, slow, env=env) as started:
        wait_for_step(started[0], stopped, 3)
        started[0].send_signal(signal.SIGTERM)
        assert_all_end(started, 75)
    (saved,) = (int(path.name) for path in (stopped / "checkpoints").iterdir())
    assert 3 <= saved < 2 * IN_ROUND
    assert rows(stopped)[-1]["step"] == saved
    with adapting(stopped, env=env) as started:
        assert_all_end(started, 0)
    assert results(stopped) == results(whole)
    assert len(results(whole)[-1]["params_sha256"]) == 64
    states = map(last_state, (stopped, whole))
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get([*states]))
    clusters = (path / "clusters.csv" for path in (stopped, whole))
    assert next(clusters).read_text() == next(clusters).read_text()


@pytest.mark.parametrize(
    ("settings", "code", "words"),
    [
        (["cluster.eps=1.5"], 2, "config.cluster.eps=1.5"),
        (["cluster.k1=144"], 2, "has 144 images to train on"),
        (["eval.every_rounds=1", "eval.path=none"], 2, "'none' does not exist"),
        (["cluster.eps=0.05", "cluster.min_samples=9"], 1, "round 0: none of 144"),
    ],
)
def test_a_mistake_and_a_collapse_have_their_exit_code(
    tmp_path, env, settings, code, words
):
    given = (f"--config.{setting}" for setting in settings)
    with adapting(tmp_path / "run", *given, env=env) as started:
        (said,) = assert_all_end(started, code)
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert words in line
    assert "Traceback" not in said
    assert (tmp_path / "run").exists() == (code == 1)
