"""Fine-tuning of one and of two processes, as it starts on two hosts."""

import pathlib
import signal
import sys

import pytest
from hosts import GLOO, assert_all_end, start_hosts, with_devices
from launching import rows, wait_for_step

SMALL = (
    "--config=configs/finetune_quickstart.py",
    *("--config.encoder.width=64", "--config.encoder.depth=1"),
    *("--config.encoder.num_heads=2", "--config.encoder.patch_size=16"),
    *("--config.data.synthetic.identities=20", "--config.data.synthetic_train=16"),
    *("--config.sampling.identities=4", "--config.sampling.images=4"),
    # What two hosts would have to agree on, if it were drawn anywhere but on the step.
    *("--config.head.drop_path=0.1", "--config.augment.erase_probability=0.5"),
    "--config.log.every_steps=1",
)
SHORT = ("--config.train.steps=10", "--config.eval.every_epochs=0.1")


@pytest.fixture(scope="module")
def env(cache) -> dict[str, str]:
    return with_devices(cache | GLOO, 2)


def processes(workdir, *settings: str, env: dict, count: int):
    """So many processes of one run; killed when left."""
    words = (f"--workdir={workdir}", *SMALL, *settings)
    return start_hosts([sys.executable, "launch/finetune.py", *words], count, env)


def finetune(workdir, *settings: str, env: dict, count: int) -> None:
    """Runs to the end."""
    with processes(workdir, *settings, env=env, count=count) as started:
        assert_all_end(started, 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, env) -> pathlib.Path:
    """The workdir of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finetune(workdir, *SHORT, env=env, count=1)
    return workdir


def numbers(workdir: pathlib.Path) -> list[float]:
    names = ("loss", "identity_loss", "triplet_loss", "grad_norm")
    return [row[name] for row in rows(workdir) for name in names]


def scores(workdir: pathlib.Path) -> list[float]:
    return [row["retrieval_mAP"] for row in rows(workdir) if "retrieval_mAP" in row]


@pytest.mark.slow
def test_two_processes_learn_and_score_as_one(tmp_path, alone, env):
    # Every array over both hosts; with fsdp=1 the test below trains its first steps.
    finetune(tmp_path, *SHORT, "--config.mesh.fsdp=4", env=env, count=2)
    # The sum over the batch is split in another place: float32 rounding, which grows.
    assert numbers(tmp_path) == pytest.approx(numbers(alone), rel=1e-3)
    assert len(scores(tmp_path)) == len(scores(alone)) == 10
    assert scores(tmp_path) == pytest.approx(scores(alone), abs=0.02)
    kept = {int(step.name) for step in (tmp_path / "checkpoints").iterdir()}
    assert kept == {int(step.name) for step in (alone / "checkpoints").iterdir()}


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step_and_one_goes_on(tmp_path, alone, env):
    with processes(tmp_path, *SHORT, env=env, count=2) as started:
        wait_for_step(started[0], tmp_path, 2)
        started[1].send_signal(signal.SIGTERM)
        assert_all_end(started, 75, timeout=120)
    finetune(tmp_path, *SHORT, env=env, count=1)
    assert numbers(tmp_path) == pytest.approx(numbers(alone), rel=1e-3)
    assert scores(tmp_path) == pytest.approx(scores(alone), abs=0.02)
