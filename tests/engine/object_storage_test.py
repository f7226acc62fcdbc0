"""A run's files on gs://, against a loopback server that has no append or rename."""

import json
import os

import jax
import numpy as np
import object_store
import pytest
from checkpoint_test import abstract, assert_same, make_state, open_checkpoints, shard
from etils import epath
from launching import TINY, pretrain
from workdir_test import open_workdir

import personmae_jax
from personmae_jax.config import Config
from personmae_jax.engine import lock, storage
from personmae_jax.engine.checkpoint import restore_encoder
from personmae_jax.engine.metrics import MetricsWriter
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.workdir import read_settings
from personmae_jax.errors import ConfigError, RunError


@pytest.fixture(scope="module")
def server():
    with object_store.serve() as store, pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", store.url)  # gcsfs and Google's client
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", store.url)
        patch.setenv("GOOGLE_CLOUD_PROJECT", "none")
        patch.setenv("NO_GCE_CHECK", "true")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks for a login
        yield store


@pytest.fixture
def store(server):
    server.objects.clear()
    server.refused.clear()
    yield server
    assert server.refused == []  # neither append nor rename was tried


@pytest.fixture
def workdir(store) -> epath.Path:
    return open_path("gs://bucket/runs/one")


def test_checkpoints_are_saved_kept_and_restored(store, workdir):
    with open_checkpoints(workdir, keep=2) as checkpoints:
        for step in (0, 10, 20, 30):
            checkpoints.save(step, shard(make_state(step), 8))
    with open_checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 30
        restored = checkpoints.restore(abstract(shard(make_state(0), 2)))
    assert_same(restored, make_state(30))
    steps = {name.split("/")[3] for name in store.objects if "checkpoints" in name}
    assert steps == {"0", "20", "30"}
    params = restore_encoder("gs://bucket/runs/one", step=20, weights="teacher")
    jax.tree.map(np.testing.assert_array_equal, params, make_state(20).teacher_params)


def test_a_half_written_checkpoint_is_not_listed_and_cleared_away(store, workdir):
    with open_checkpoints(workdir) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, make_state(step))
    # The commit mark is written last; a killed run leaves all but that.
    del store.objects["runs/one/checkpoints/2/commit_success.txt"]
    np.testing.assert_equal(restore_encoder(workdir), make_state(1).params["encoder"])
    with open_checkpoints(workdir) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, make_state(2))
        checkpoints.wait()
        assert_same(checkpoints.restore(abstract(make_state(0))), make_state(2))


def save_and_wait(checkpoints, step: int) -> None:
    checkpoints.save(step, make_state(step))
    checkpoints.wait()


# Of several writes that fail, orbax leaves all but the first to a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_storage_that_fails_is_told_and_older_checkpoints_are_good(store, workdir):
    with open_checkpoints(workdir) as checkpoints:
        checkpoints.save(1, make_state(1))
        checkpoints.wait()
        store.is_read_only = True
        try:
            with pytest.raises(RunError, match="older checkpoints are still good: 1"):
                save_and_wait(checkpoints, 2)
        finally:
            store.is_read_only = False
        assert checkpoints.latest_step() == 1


def test_lock_and_config(store, workdir, monkeypatch):
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    cfg = Config()
    with open_workdir("gs://bucket/runs/one", cfg):
        holder = json.loads(store.objects["runs/one/lock"][1])
    assert "runs/one/lock" not in store.objects
    (workdir / "lock").write_text(json.dumps(holder | {"pid": os.getppid()}))
    with pytest.raises(ConfigError, match="is in use"), open_workdir(workdir, cfg):
        pass
    (workdir / "lock").unlink()
    assert read_settings("gs://bucket/runs/one") == cfg
    cfg.train.seed = 1
    with pytest.raises(ConfigError, match="config.train.seed: 0 there, 1 here"):
        open_workdir(workdir, cfg).__enter__()
    with pytest.raises(ConfigError, match="the data has 55 records"):
        open_workdir(workdir, Config(), num_records=55).__enter__()


def test_metrics_and_pictures(store, workdir):
    for start_step, steps in ((0, (1, 2, 3)), (2, (3,))):
        with MetricsWriter(workdir, start_step) as writer:
            for step in steps:
                writer.write(step, {"loss": float(start_step)})
            writer.write_picture(step, np.zeros((4, 4, 3), np.uint8))
    lines = store.objects["runs/one/metrics.jsonl"][1].decode().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [(r["step"], r["loss"]) for r in rows] == [(1, 0.0), (2, 0.0), (3, 2.0)]
    assert store.objects["runs/one/pictures/3.png"][1].startswith(b"\x89PNG")
    names = [n for n in store.objects if n.startswith("runs/one/tensorboard/")]
    assert len(names) == 2


@pytest.mark.slow
def test_a_run_is_trained_resumed_and_loaded_there(store, workdir, cache):
    words = (*TINY, "--config.train.steps=6", "--config.checkpoint.every_steps=3")
    process = pretrain(workdir, *words, env=cache)
    assert process.returncode == 0, process.stderr
    first = (workdir / "metrics.jsonl").read_text().splitlines()
    for name in [n for n in store.objects if n.startswith("runs/one/checkpoints/6/")]:
        del store.objects[name]  # as if it had been killed before its last step
    process = pretrain(workdir, *words, env=cache)
    assert process.returncode == 0, process.stderr
    again = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in again] == [1, 2, 3, 4, 5, 6]
    hashes = [json.loads(rows[-1])["params_sha256"] for rows in (first, again)]
    assert hashes[0] == hashes[1]
    assert (workdir / "pictures" / "6.png").exists()
    params, _ = personmae_jax.load_encoder(str(workdir))
    assert params["norm"]["scale"].shape == (16,)


def test_an_object_that_is_not_taken_is_told_as_a_full_disk_is(monkeypatch):
    """Storages raise errors of their own, such as gcsfs's, which are no OSError."""

    class HttpError(Exception):
        pass

    def fail(*_):
        raise HttpError("backend error, 503")

    file = epath.Path("gs://bucket/run/retrieval.json")
    monkeypatch.setattr(type(file), "mkdir", lambda *_, **__: None)
    monkeypatch.setattr(type(file), "write_bytes", fail)
    with pytest.raises(RunError, match="the scores cannot be written .*error, 503"):
        with storage.reporting_failure("the scores"):
            storage.write_whole(file, "{}")
