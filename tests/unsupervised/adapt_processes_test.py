"""Training without labels of one and of two processes, as it starts on two hosts."""

import pathlib
import signal
import sys

import jax
import numpy as np
import pytest
from hosts import GLOO, assert_all_end, start_hosts, with_devices
from launching import rows, wait_for_step
from unlabelled import SMALL, last_state, num_split


@pytest.fixture(scope="module")
def env(cache) -> dict[str, str]:
    return with_devices(cache | GLOO, 2)


def processes(workdir, *settings: str, env: dict, count: int):
    """So many processes of one run; killed when left."""
    words = (f"--workdir={workdir}", *SMALL, *settings)
    return start_hosts([sys.executable, "launch/adapt.py", *words], count, env)


def adapt(workdir, *settings: str, env: dict, count: int) -> None:
    """Runs to the end."""
    with processes(workdir, *settings, env=env, count=count) as started:
        assert_all_end(started, 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, env) -> pathlib.Path:
    """The workdir of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    adapt(workdir, env=env, count=1)
    return workdir


def losses(workdir: pathlib.Path) -> list[float]:
    return [row["loss"] for row in rows(workdir) if "loss" in row]


def rounds(workdir: pathlib.Path) -> list[tuple]:
    names = ("round", "eps", "clusters", "outliers", "largest_cluster")
    return [tuple(row[n] for n in names) for row in rows(workdir) if "round" in row]


def assert_equal(workdir: pathlib.Path, alone: pathlib.Path) -> None:
    """The same labels in every round; losses and memory but for float32 rounding."""
    assert rounds(workdir) == rounds(alone)
    assert len(rounds(workdir)) == 3
    clusters = (path / "clusters.csv" for path in (workdir, alone))
    assert next(clusters).read_text() == next(clusters).read_text()
    # Half of every batch is read and labelled by the second process.
    assert losses(workdir) == pytest.approx(losses(alone), rel=1e-3)
    assert len(losses(workdir)) == 12
    two, one = jax.device_get([last_state(workdir), last_state(alone)])
    np.testing.assert_array_equal(two.labels, one.labels)
    assert two.memory.num_rows == one.memory.num_rows > 1
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), two.memory, one.memory
    )


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 4])
def test_two_processes_train_on_the_clusters_of_the_first_as_one_does(
    tmp_path, alone, env, fsdp
):
    adapt(tmp_path, f"--config.mesh.fsdp={fsdp}", env=env, count=2)
    assert_equal(tmp_path, alone)
    assert (num_split(last_state(tmp_path).params) > 0) == (fsdp > 1)


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_of_a_round_and_go_on(tmp_path, alone, env):
    with processes(tmp_path, env=env, count=2) as started:
        wait_for_step(started[0], tmp_path, 2)
        started[1].send_signal(signal.SIGTERM)
        assert_all_end(started, 75, timeout=120)
    adapt(tmp_path, env=env, count=1)
    assert_equal(tmp_path, alone)
