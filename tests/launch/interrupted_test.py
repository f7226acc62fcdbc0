"""A run of the command that is killed and stopped, and what it leaves when finished."""

import pathlib
import signal

import numpy as np
import pytest
from launching import TINY, assert_refused, pretrain, rows, start, wait_for_step

import personmae_jax

SMALL = (
    *TINY,
    # Every step renders enough people for a run to be met in the middle.
    *("--config.train.batch_size=48", "--config.train.steps=40"),
    # By default the teacher of so short a run remembers nothing: it is the student.
    "--config.teacher.start_fraction=0.1",
    "--config.teacher.end_fraction=0.1",
    *("--config.eval.every_steps=10", "--config.eval.identities=8"),
)
# What differs between two runs of the same computation.
CLOCK = ("images_per_second", "data_seconds")


def results(workdir) -> list[dict]:
    """Rows without the clock's readings."""
    return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows(workdir)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cache) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    process = pretrain(workdir, *SMALL, env=cache)
    assert process.returncode == 0, process.stderr
    return workdir


def test_run_killed_and_stopped_by_signals_equals_uninterrupted(
    tmp_path, uninterrupted, cache
):
    workdir, step = tmp_path / "run", 0
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        process = start(workdir, *SMALL, "--config.checkpoint.every_steps=5", env=cache)
        wait_for_step(process, workdir, step + 3)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
        step = rows(workdir)[-1]["step"]
        assert step < 40
        if number == signal.SIGKILL:
            assert process.returncode == -number
        else:
            assert process.returncode == 75, stderr
            # Nothing is lost: the step that was shown last is saved.
            assert (workdir / "checkpoints" / str(step)).is_dir()
    process = pretrain(workdir, *SMALL, env=cache)
    assert process.returncode == 0, process.stderr
    assert [row["step"] for row in rows(workdir)] == list(range(41))
    assert results(workdir) == results(uninterrupted)
    assert len(rows(workdir)[-1]["params_sha256"]) == 64


def test_finished_run_has_its_last_picture(uninterrupted):
    picture = (uninterrupted / "pictures" / "40.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 1000


def test_finished_run_started_again_says_so(uninterrupted, cache):
    before = results(uninterrupted)
    process = pretrain(uninterrupted, *SMALL, env=cache)
    assert process.returncode == 0
    assert "finished" in process.stdout
    assert results(uninterrupted) == before


def test_other_settings_in_the_same_workdir_are_refused_by_name(uninterrupted):
    process = pretrain(uninterrupted, *SMALL, "--config.encoder.depth=5")
    assert_refused(process, "encoder.depth: 1 there, 5 here")


def test_load_encoder_gives_the_tokens_of_a_run(uninterrupted):
    params, apply = personmae_jax.load_encoder(str(uninterrupted))
    untrained, _ = personmae_jax.load_encoder(str(uninterrupted), step=0)
    teacher, _ = personmae_jax.load_encoder(str(uninterrupted), weights="teacher")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 16, 3)).astype(np.uint8)
    tokens = [np.asarray(apply(p, images)) for p in (params, untrained, teacher)]
    assert tokens[0].shape == (2, 1 + 8, 16)
    assert all(np.isfinite(t).all() for t in tokens)
    assert not np.allclose(tokens[0], tokens[1], atol=1e-3)
    assert not np.allclose(tokens[0], tokens[2], atol=1e-6)
    with pytest.raises(ValueError, match="uint8 RGB"):
        apply(params, images[:, :8])
