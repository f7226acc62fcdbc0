import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from personmae_jax.config import Config
from personmae_jax.config_json import config_to_json
from personmae_jax.config_values import field_paths
from personmae_jax.engine import lock, storage, workdir
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.workdir import Workdir, read_settings
from personmae_jax.errors import ConfigError, RunError

REPOSITORY = pathlib.Path(__file__).parents[2]


def changed(**sections) -> Config:
    """A config with `section={"field": value}` changed."""
    cfg = Config()
    for section, fields in sections.items():
        for name, value in fields.items():
            setattr(getattr(cfg, section), name, value)
    return cfg


def open_workdir(folder, cfg: Config, **data: int | str) -> Workdir:
    return Workdir(folder, cfg, **{"num_records": 24, "num_steps": 60} | data)


@pytest.mark.parametrize("name", ["metrics.jsonl", "pictures"])
def test_a_folder_of_something_else_is_refused_and_left(tmp_path, name):
    (tmp_path / name).mkdir() if name == "pictures" else (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"holds {name} without a run's config"):
        open_workdir(tmp_path, Config()).__enter__()
    assert not (tmp_path / "config.json").exists()


def test_a_run_goes_on_with_the_images_of_its_names_only(tmp_path):
    with open_workdir(tmp_path, Config(), records_sha256="a" * 64):
        pass
    with open_workdir(tmp_path, Config(), records_sha256="a" * 64):
        pass
    with pytest.raises(ConfigError, match=r"24 records \(SHA-256 bbbbbbbbbbbb\)"):
        open_workdir(tmp_path, Config(), records_sha256="b" * 64).__enter__()


def start(code: str, *arguments: object) -> subprocess.Popen:
    """`code` in a process of its own; returns when it has said "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


HOLD = """
import signal, subprocess, sys
from pathlib import Path
from personmae_jax.config import Config
from personmae_jax.engine.workdir import Workdir
with Workdir(sys.argv[1], Config(), num_records=24, num_steps=60):
    # A worker that outlives its parent, and inherits all that can be inherited.
    worker = subprocess.Popen(
        ["sleep", "100"], stdout=subprocess.DEVNULL, close_fds=False
    )
    Path(sys.argv[1], "worker").write_text(str(worker.pid))
    print("ready", flush=True)
    signal.pause()
"""


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path):
    with start(HOLD, tmp_path) as first:
        try:
            holder = f"in use by process {first.pid} on .*stop that run or use another"
            with pytest.raises(ConfigError, match=holder):
                open_workdir(tmp_path, Config()).__enter__()
            first.kill()
            first.wait()
            with open_workdir(tmp_path, Config()):  # though its worker still lives
                pass
        finally:
            first.kill()
            os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)


def test_a_run_that_ended_leaves_the_workdir_free(tmp_path):
    for _ in range(2):
        with open_workdir(tmp_path, Config()):
            with pytest.raises(ConfigError), open_workdir(tmp_path, Config()):
                pass


def test_a_refused_configuration_leaves_the_workdir_free(tmp_path):
    with open_workdir(tmp_path, Config()):
        pass
    with pytest.raises(ConfigError), open_workdir(tmp_path, changed(train={"seed": 1})):
        pass
    with open_workdir(tmp_path, Config()):
        pass


@pytest.fixture
def heartbeat_lock(monkeypatch):
    """Locks as on a file system without flock, with short times."""
    monkeypatch.setattr(lock, "SETTLE", 0.01)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
    monkeypatch.setattr(lock, "WATCH", 0.01)

    def no_flock(*_):
        raise OSError(lock.errno.ENOSYS, "no flock")

    monkeypatch.setattr(lock.fcntl, "flock", no_flock)


def write_holder(folder: pathlib.Path, **changes) -> None:
    holder = lock._identity() | {"id": "other", "heartbeat": time.time()} | changes
    (folder / "lock").write_text(json.dumps(holder))


@pytest.mark.usefixtures("heartbeat_lock")
def test_without_flock_a_living_holder_is_respected(tmp_path, monkeypatch):
    write_holder(tmp_path, pid=os.getppid())
    with pytest.raises(ConfigError, match=f"in use by process {os.getppid()}"):
        open_workdir(tmp_path, Config()).__enter__()
    looks = []

    def look_once_more(self):  # another host's heartbeat comes after the third look
        looks.append(1)
        write_holder(tmp_path, host="elsewhere", pid=7, heartbeat=beats[len(looks) > 3])
        return read(self)

    beats = (time.time() - 60, time.time() - 30)
    read = lock.HeartbeatLock._read
    monkeypatch.setattr(lock.HeartbeatLock, "_read", look_once_more)
    with pytest.raises(ConfigError, match="in use by process 7 on elsewhere"):
        open_workdir(tmp_path, Config()).__enter__()
    assert len(looks) == 4


@pytest.mark.usefixtures("heartbeat_lock")
@pytest.mark.parametrize("ahead", [-0.25, 3600.0])
def test_without_flock_a_holder_that_falls_silent_is_waited_for(
    tmp_path, monkeypatch, ahead
):
    """Whatever its host's clock says: what another host wrote is not changed."""
    monkeypatch.setattr(lock, "STALE", 0.5)
    write_holder(tmp_path, host="elsewhere", heartbeat=time.time() + ahead)
    began = time.monotonic()
    with open_workdir(tmp_path, Config()) as run:
        run.check_held()
    assert time.monotonic() - began >= min(0.2, 0.5 + ahead)


@pytest.mark.usefixtures("heartbeat_lock")
@pytest.mark.parametrize("how", ["same host", "restarted container", "silent", "torn"])
def test_without_flock_the_lock_of_a_dead_run_is_taken_over(tmp_path, how):
    dead = subprocess.Popen(["true"])
    dead.wait()
    if how == "same host":
        write_holder(tmp_path, pid=dead.pid)
    elif how == "restarted container":
        write_holder(tmp_path, pid=os.getpid())
    elif how == "silent":
        write_holder(tmp_path, host="elsewhere", heartbeat=time.time() - 181)
    else:
        (tmp_path / "lock").write_bytes(b'{"host": "els')
    with open_workdir(tmp_path, Config()) as run:
        run.check_held()
    assert not (tmp_path / "lock").exists()


@pytest.mark.usefixtures("heartbeat_lock")
def test_without_flock_the_lock_is_refreshed_and_its_loss_noticed(tmp_path):
    def heartbeat() -> float:
        return lock._parse((tmp_path / "lock").read_bytes())["heartbeat"]

    with open_workdir(tmp_path, Config()) as run:
        first = heartbeat()
        wait_until(lambda: heartbeat() > first)
        run.check_held()
        lost_for = {"host": "elsewhere", "pid": 7}
        # Until the holder's own refresh, which may have been under way, is over.
        wait_until(lambda: write_holder(tmp_path, **lost_for) or run._lock.is_lost())
        with pytest.raises(RunError, match="no longer this run's"):
            run.check_held()
    assert json.loads((tmp_path / "lock").read_text())["host"] == "elsewhere"


def test_removed_workdir_is_noticed(tmp_path):
    with open_workdir(tmp_path / "run", Config()) as run:
        run.check_held()
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(RunError, match="no longer this run's"):
            run.check_held()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.usefixtures("heartbeat_lock")
def test_without_flock_one_of_two_simultaneous_starts_is_refused(tmp_path, monkeypatch):
    write = lock.HeartbeatLock._write

    def write_then_rival_writes(self):
        write(self)
        write_holder(tmp_path, host="elsewhere", pid=7)

    monkeypatch.setattr(lock.HeartbeatLock, "_write", write_then_rival_writes)
    with pytest.raises(ConfigError, match="elsewhere.*at the same time"):
        lock.HeartbeatLock(epath.Path(tmp_path), f"--workdir={tmp_path}")


def test_config_is_written_at_the_first_start_and_read_back(tmp_path):
    cfg = changed(encoder={"width": 384, "num_heads": 6})
    with open_workdir(tmp_path / "new" / "run", cfg):
        pass
    assert read_settings(tmp_path / "new" / "run") == cfg


def test_other_settings_are_refused_naming_every_field(tmp_path):
    with open_workdir(tmp_path, Config()):
        pass
    before = (tmp_path / "config.json").read_text()
    other = changed(encoder={"width": 384}, train={"seed": 1}, log={"every_steps": 7})
    with pytest.raises(ConfigError) as error, open_workdir(tmp_path, other):
        pass
    assert "config.encoder.width: 768 there, 384 here" in str(error.value)
    assert "config.train.seed: 0 there, 1 here" in str(error.value)
    assert "config.log" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_settings_that_change_no_result_may_change_and_are_kept_as_new(tmp_path):
    with open_workdir(tmp_path, Config()):
        pass
    other = changed(
        data={
            "path": "/x",
            "num_threads": 1,
            "num_workers": 2,
            "max_bad_fraction": 0.5,
        },
        train={"accumulate": 4},
        checkpoint={"every_steps": 7, "keep": 9},
        log={"every_steps": 7, "num_pictures": 1},
    )
    with open_workdir(tmp_path, other):
        pass
    assert read_settings(tmp_path) == other


@pytest.mark.parametrize(
    "data", [{"num_records": 55}, {"num_steps": 137}, {"num_identities": 7}]
)
def test_other_data_are_refused_wherever_they_lie(tmp_path, data):
    with open_workdir(tmp_path, Config()):
        pass
    message = "the data has .* but .* began with 24 records for 60 steps"
    moved = changed(data={"path": "/x"})
    with (
        pytest.raises(ConfigError, match=message),
        open_workdir(tmp_path, moved, **data),
    ):
        pass
    assert read_settings(tmp_path) == Config()
    with open_workdir(tmp_path, moved):
        pass


def test_a_run_goes_on_with_a_setting_that_came_later(tmp_path):
    tree = json.loads(config_to_json(Config()))
    del tree["train"]["seed"]
    (tmp_path / "config.json").write_text(json.dumps(tree))
    other = changed(train={"seed": 1})
    with pytest.raises(ConfigError, match="config.train.seed: 0 there, 1 here"):
        open_workdir(tmp_path, other).__enter__()
    with open_workdir(tmp_path, Config()):
        pass
    assert read_settings(tmp_path) == Config()


def test_a_run_is_not_continued_without_a_setting_that_is_gone(tmp_path):
    tree = json.loads(config_to_json(Config()))
    tree["loss"]["feature_loss"] = "cosine"
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match="feature_loss='cosine', which .* no longer"):
        open_workdir(tmp_path, Config()).__enter__()


def test_free_fields_are_fields():
    names = [name for name, _ in field_paths(Config(), "config.")]
    for free in workdir.FREE_FIELDS:
        assert any(workdir._is_below(name, free) for name in names), free


@pytest.mark.parametrize(
    "content",
    [b"", b"{torn", b"\xff\xfe\x00", b"null", b"[" * 50_000, b" " * (1 << 21), None],
)
@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_damaged_record_is_refused_not_overwritten(tmp_path, content, name):
    file = tmp_path / name
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"{name}.*restore it or use another"):
        with open_workdir(tmp_path, Config()):
            pass
    with pytest.raises(ConfigError, match="config.json"):
        read_settings(tmp_path)
    assert content is None or file.read_bytes() == content


@pytest.mark.parametrize("name", ["lock", "config.json.part", "run.json.part"])
def test_what_a_link_points_to_is_never_written(tmp_path, name):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(mine)
    if name == "lock":
        with pytest.raises(ConfigError, match="is a link; remove it"):
            open_workdir(tmp_path / "run", Config()).__enter__()
    else:
        with open_workdir(tmp_path / "run", Config()):
            pass
    assert mine.read_text() == "precious"


@pytest.mark.parametrize("name", ["lock", "config.json", "run.json"])
def test_a_pipe_in_the_folder_is_refused_without_waiting(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        open_workdir(tmp_path, Config()).__enter__()


def test_a_folder_with_other_files_is_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with open_workdir(tmp_path, Config()):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "file/below", "/proc/none"])
def test_a_workdir_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--workdir=.* cannot be written"):
        with open_workdir(tmp_path / name, Config()):
            pass


def test_reading_the_config_creates_nothing(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        read_settings(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_object_storage_without_its_package_names_what_to_install(monkeypatch):
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="requirements-gcs.txt"):
        open_path("gs://bucket/run")


def test_other_storage_is_refused():
    with pytest.raises(ConfigError, match="s3://"):
        open_path("s3://bucket/run")
