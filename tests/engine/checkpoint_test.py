import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from etils import epath
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from personmae_jax.engine import checkpoint, checkpoint_files
from personmae_jax.engine.checkpoint import Checkpoints, describe, restore_encoder
from personmae_jax.errors import ConfigError, RunError

REPOSITORY = pathlib.Path(__file__).parents[2]
CONFIG = {"train": {"seed": 3}, "mean": (0.5, 0.25)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: Any
    params: Any
    teacher_params: Any
    extra: Any
    opt_state: Any


def make_state(step: int, width: int = 16) -> State:
    """A state that tells the step, and that compression makes no smaller."""
    kernel = np.random.default_rng(step).standard_normal((width, 4), np.float32)
    encoder = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(4)}
    params = {"encoder": encoder, "pixel_predictor": {"kernel": jnp.ones((2, 2))}}
    return State(
        step=jnp.int32(step),
        params=params,
        teacher_params=jax.tree.map(lambda x: x / 2, encoder),
        extra=jnp.zeros(3),
        opt_state=optax.adamw(1e-3).init(params),
    )


def shard(state: State, num_devices: int) -> State:
    """The state over `num_devices`, matrices split by rows."""
    mesh = jax.make_mesh(
        (num_devices,),
        ("data",),
        axis_types=(AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )

    def put(x):
        split = x.ndim == 2 and x.shape[0] % num_devices == 0
        spec = PartitionSpec("data") if split else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(put, state)


def abstract(state: State) -> State:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def open_checkpoints(folder, keep: int = 2) -> Checkpoints:
    return Checkpoints(epath.Path(folder), keep=keep, config=CONFIG)


def assert_same(a: State, b: State) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def listing(folder: pathlib.Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


@pytest.fixture
def saved(tmp_path):
    """A workdir with checkpoints 0, 10 and 20."""
    with open_checkpoints(tmp_path) as checkpoints:
        for step in (0, 10, 20):
            checkpoints.save(step, make_state(step))
    return tmp_path


def test_latest_ones_and_step_0_are_kept(tmp_path):
    with open_checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (0, 10, 20, 30, 40):
            checkpoints.save(step, make_state(step))
    folders = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert folders == {"0", "30", "40"}


@pytest.mark.parametrize(("before", "after"), [(8, 2), (1, 8), (8, 1)])
def test_restores_bit_for_bit_on_other_devices(tmp_path, before, after):
    state = shard(make_state(7), before)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state)
        wanted = abstract(shard(make_state(0), after))
        restored = checkpoints.restore(wanted)
    assert_same(restored, state)
    assert isinstance(restored, State)
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True)
    assert all(x.sharding == w.sharding for x, w in pairs)


def test_donating_the_state_right_after_save_leaves_the_checkpoint_intact(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = shard(make_state(5, width=1 << 16), 8)
    with open_checkpoints(tmp_path) as checkpoints:
        with jax.transfer_guard("disallow"):  # as in the loop
            checkpoints.save(5, state)
            for _ in range(20):
                state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(abstract(shard(make_state(5, 1 << 16), 8)), 5)
    assert_same(restored, make_state(5, width=1 << 16))


def test_the_loop_s_guard_does_not_refuse_what_orbax_fetches(tmp_path, monkeypatch):
    """On a GPU or TPU: a CPU's arrays are read without a transfer."""
    guards, state = [], make_state(1)
    with open_checkpoints(tmp_path) as checkpoints:
        save = checkpoints._manager.save

        def note_guard(*args, **kwargs):
            guards.append(jax.config.jax_transfer_guard_device_to_host)
            return save(*args, **kwargs)

        monkeypatch.setattr(checkpoints._manager, "save", note_guard)
        with jax.transfer_guard("disallow"):
            checkpoints.save(1, state)
    assert guards == ["allow"]


def test_saving_a_step_twice_is_no_error(saved):
    with open_checkpoints(saved) as checkpoints:
        checkpoints.save(20, make_state(99))
        assert int(checkpoints.restore(abstract(make_state(0))).step) == 20


def test_checkpoint_carries_config_revision_and_versions(saved):
    text = (saved / "checkpoints" / "20" / "_CHECKPOINT_METADATA").read_text()
    about = json.loads(text)["custom_metadata"]
    assert about["config"] == {"train": {"seed": 3}, "mean": [0.5, 0.25]}
    assert about["versions"]["jax"] == jax.__version__
    assert "git_revision" in about


def test_other_shapes_are_refused_naming_the_arrays(saved):
    with open_checkpoints(saved) as checkpoints:
        wanted = abstract(make_state(0, width=32))
        with pytest.raises(RunError, match=r"params/encoder/kernel.*\[16, 4\] there"):
            checkpoints.restore(wanted)


def test_an_array_that_only_earlier_versions_had_is_not_read(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        state = make_state(3)
        old = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        checkpoints.save(3, old | {"target_mean": jnp.ones(5)})
        restored = checkpoints.restore(abstract(state))
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def test_other_dtypes_are_refused(saved):
    state = make_state(0)
    wanted = dataclasses.replace(state, extra=jnp.zeros(3, jnp.bfloat16))
    with open_checkpoints(saved) as checkpoints:
        with pytest.raises(RunError, match="float32.* there, bfloat16.* here"):
            checkpoints.restore(abstract(wanted))


def test_a_missing_step_is_refused_naming_those_there(saved):
    with open_checkpoints(saved) as checkpoints:
        with pytest.raises(ConfigError, match="step 15; there are steps 0, 10, 20"):
            checkpoints.restore(abstract(make_state(0)), 15)


def damage(saved, how: str) -> None:
    """Damages checkpoint 20, whose arrays lie in the files of the d/ folders."""
    state = saved / "checkpoints" / "20" / "state"
    if how == "metadata":
        (state / "_METADATA").write_bytes(b"{torn")
        return
    for file in state.rglob("d/*"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if how == "torn" else b"")


# Of several reads that fail, orbax leaves all but the first to a closed event loop.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["metadata", "torn", "empty"])
def test_damage_is_told_with_the_step_and_the_mend(saved, how):
    damage(saved, how)
    message = "checkpoints/20 is damaged .*move it elsewhere to go on from step 10"
    with open_checkpoints(saved) as checkpoints:
        with pytest.raises(RunError, match=message):
            checkpoints.restore(abstract(make_state(0)))
        restored = checkpoints.restore(abstract(make_state(0)), 10)
    assert_same(restored, make_state(10))
    with pytest.raises(RunError, match=message):
        restore_encoder(saved)


def state_files(saved) -> list[pathlib.Path]:
    state = saved / "checkpoints" / "20" / "state"
    # Orbax only asks whether commit_success.txt is there.
    return sorted(
        file
        for file in state.rglob("*")
        if file.is_file() and file.name != "commit_success.txt"
    )


def test_one_flipped_bit_in_any_file_is_found_and_the_older_checkpoint_offered(saved):
    message = "checkpoints/20 is damaged .*move it elsewhere to go on from step 10"
    assert len(state_files(saved)) >= 4
    with open_checkpoints(saved) as checkpoints:
        for file in state_files(saved):
            data = file.read_bytes()
            for place in {0, len(data) // 2, len(data) - 1}:
                flipped = bytearray(data)
                flipped[place] ^= 1
                file.write_bytes(flipped)
                with pytest.raises(RunError, match=message):
                    checkpoints.restore(abstract(make_state(0)))
                with pytest.raises(RunError, match=message):
                    restore_encoder(saved)
            file.write_bytes(data)
        assert_same(checkpoints.restore(abstract(make_state(0))), make_state(20))


def test_a_lost_file_is_found(saved):
    lost = next(f for f in state_files(saved) if f.parent.name == "d")
    lost.unlink()
    with pytest.raises(RunError, match="checkpoints/20 is damaged .*from step 10"):
        restore_encoder(saved)


@pytest.mark.parametrize("how", ["state", "about"])
def test_a_state_belongs_to_its_step_and_settings(saved, how):
    folder = saved / "checkpoints" / "20"
    if how == "state":
        shutil.rmtree(folder / "state")
        shutil.copytree(saved / "checkpoints" / "10" / "state", folder / "state")
    else:
        file = folder / "_CHECKPOINT_METADATA"
        text = file.read_text()
        file.write_text(text.replace('"seed": 3', '"seed": 4'))
        assert file.read_text() != text
        assert describe(saved)[1]["config"]["train"]["seed"] == 3  # of our own file
    with open_checkpoints(saved) as checkpoints:
        with pytest.raises(RunError, match="_METADATA is not what was written for thi"):
            checkpoints.restore(abstract(make_state(0)))


def test_a_checkpoint_of_an_earlier_version_loads_and_has_no_digests_is_said(
    saved, caplog
):
    (saved / "checkpoints" / "20" / "state" / "digests.json").unlink()
    with open_checkpoints(saved) as checkpoints:
        assert_same(checkpoints.restore(abstract(make_state(0))), make_state(20))
    assert "without digests: damage may not show" in caplog.text


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '["a"]', '{"/dev/zero": ""}', '{"../../x": ""}', "{"]
)
def test_digests_that_are_none_or_of_other_files_are_damage(saved, content):
    (saved / "checkpoints" / "20" / "state" / "digests.json").write_text(content)
    with pytest.raises(RunError, match="checkpoints/20 is damaged .*from step 10"):
        restore_encoder(saved)


def test_a_pipe_in_the_place_of_a_file_is_waited_for_by_nobody(saved):
    file = state_files(saved)[0]
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RunError, match="checkpoints/20 cannot be read"):
        restore_encoder(saved)


def test_arrays_larger_than_files_can_hold_are_refused_before_they_are_made(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint_files, "_SMALL", 0)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"params": {"encoder": np.zeros(1 << 24, np.float32)}})
    with pytest.raises(RunError, match=r"damaged \(arrays of 7e\+07 bytes in files"):
        restore_encoder(tmp_path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_read_that_fails_is_no_damage_and_nobody_is_told_to_remove(
    saved, monkeypatch, number
):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_files, "_digests", fail)
    with pytest.raises(RunError, match="may well be whole.*remove nothing"):
        restore_encoder(saved)


def test_after_whole_files_nothing_that_fails_is_called_damage(saved, monkeypatch):
    def fail(*_, **__):
        raise ValueError("UNAVAILABLE: storage is away")

    monkeypatch.setattr(checkpoint_files.ocp.Checkpointer, "restore", fail)
    with pytest.raises(RunError, match="storage is away.*remove nothing"):
        restore_encoder(saved)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b'{"custom_metadata": null}',
        b'{"custom_metadata": {"config": 1, "git_revision": [], "versions": 7}}',
        b'{"custom_metadata": ' + b"9" * 5000 + b"}",
    ],
)
@pytest.mark.parametrize("file", ["_CHECKPOINT_METADATA", "state/about.json"])
def test_a_hostile_description_of_a_checkpoint_is_one_sentence(saved, content, file):
    (saved / "checkpoints" / "20" / file).write_bytes(content)
    if "state" not in file:  # as of an earlier version, which had no other
        (saved / "checkpoints" / "20" / "state" / "about.json").unlink()
    with pytest.raises(RunError, match="is damaged .*go on from step 10") as error:
        describe(saved)
    assert len(str(error.value)) < 1000


def test_a_checkpoint_disappears_at_once_when_it_is_removed(saved, monkeypatch):
    """Else a run that is killed meanwhile leaves a part that looks whole."""
    monkeypatch.setattr(checkpoint, "_empty_removed", lambda folder: None)
    with open_checkpoints(saved, keep=1) as checkpoints:
        checkpoints.save(30, make_state(30))
    assert {"0", "30", "removed"} == {p.name for p in (saved / "checkpoints").iterdir()}
    monkeypatch.undo()
    with open_checkpoints(saved, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 30
        assert not (saved / "checkpoints" / "removed").exists()


def test_what_a_run_killed_after_its_last_save_left_too_many_is_removed(saved):
    with open_checkpoints(saved, keep=1) as checkpoints:
        checkpoints.prune()
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"0", "20"}


def test_what_is_pinned_survives_that_too(saved):
    with open_checkpoints(saved, keep=1) as checkpoints:
        checkpoints.pin(10)
        checkpoints.prune()
    assert {p.name for p in (saved / "checkpoints").iterdir()} == {"0", "10", "20"}


@pytest.mark.parametrize(("weights", "factor"), [("student", 1), ("teacher", 0.5)])
def test_encoder_is_restored_alone_and_nothing_is_created(saved, weights, factor):
    before = listing(saved)
    params = restore_encoder(saved, step=10, weights=weights)
    expected = make_state(10).params["encoder"]["kernel"] * factor
    np.testing.assert_array_equal(params["kernel"], expected)
    assert set(params) == {"kernel", "bias"}
    assert all(type(x) is np.ndarray for x in params.values())
    assert listing(saved) == before


def test_encoder_of_unknown_weights_is_refused_naming_the_choices(saved):
    with pytest.raises(ConfigError, match="'techer' is unknown.* student, teacher"):
        restore_encoder(saved, weights="techer")


def test_a_checkpoint_is_whole_however_late_orbax_says_what_it_is_of(
    tmp_path, monkeypatch
):
    """Orbax writes that in a thread of its own."""
    store = orbax.checkpoint._src.metadata.checkpoint._MetadataStoreImpl
    update = store.update

    def late(*given, **values):
        time.sleep(1.0)
        update(*given, **values)

    monkeypatch.setattr(store, "update", late)
    with open_checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1))
    assert describe(tmp_path)[1]["config"]["train"] == {"seed": 3}
    restore_encoder(tmp_path)


def test_one_that_was_hashed_too_early_by_an_earlier_version_loads(saved):
    """Its digest is that of no settings, although they were written then."""
    digests = saved / "checkpoints" / "20" / "state" / "digests.json"
    wanted = json.loads(digests.read_text())
    del wanted["about.json"]
    (digests.parent / "about.json").unlink()
    text = json.dumps(["20", {}]).encode()
    wanted["_CHECKPOINT_METADATA"] = hashlib.sha256(text).hexdigest()
    digests.write_text(json.dumps(wanted))
    restore_encoder(saved)


def test_one_that_is_removed_while_it_is_read_is_not_called_damaged(saved, monkeypatch):
    folder = epath.Path(saved) / "checkpoints" / "20"

    def remove(*_):
        folder.rmtree()
        raise FileNotFoundError("digests.json")

    monkeypatch.setattr(checkpoint_files, "_digests", remove)
    with pytest.raises(RunError, match="was removed while it was read"):
        restore_encoder(saved)


def test_what_cannot_be_removed_yet_stops_no_run(saved, monkeypatch, caplog):
    (saved / "checkpoints/removed/7").mkdir(parents=True)

    def fail(_):
        raise OSError("busy")

    monkeypatch.setattr(type(epath.Path(saved)), "rmtree", fail)
    with open_checkpoints(saved) as checkpoints:
        checkpoints.save(30, make_state(30))
    restore_encoder(saved, 30)
    assert "removed cannot be removed: busy" in caplog.text


def test_restoring_warns_of_nothing(saved, caplog):
    with open_checkpoints(saved) as checkpoints:
        checkpoints.restore(abstract(make_state(0)))
    restore_encoder(saved)
    assert [r.getMessage() for r in caplog.records if r.levelname != "INFO"] == []


def test_encoder_of_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no whole checkpoint"):
        restore_encoder(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def start(code: str, *arguments: object) -> subprocess.Popen:
    """This file's helpers in a process of its own, then `code`."""
    prelude = (
        f"import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})\n"
    )
    prelude += "from checkpoint_test import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        # Not its standard error: traces of other threads would run into the lines.
        text=True,
    )


SAVE_FOR_EVER = """
checkpoints = open_checkpoints(sys.argv[1])
step = (checkpoints.latest_step() or 0) + 1
while True:
    checkpoints.save(step, make_state(step, width=1 << 18))
    step += 1
"""


@pytest.mark.slow
def test_killed_while_saving_it_goes_on_from_an_older_whole_checkpoint(tmp_path):
    folder = tmp_path / "checkpoints"
    last = 0
    for delay in (0, *(random.Random(0).uniform(0, 0.02) for _ in range(3))):
        process = start(SAVE_FOR_EVER, tmp_path)
        newest = folder / str(last + 2)
        while not newest.exists() and process.poll() is None:
            time.sleep(0.001)
        while not list(folder.glob("*tmp*")) and process.poll() is None:
            pass
        time.sleep(delay)  # the moment of the kill, within one save
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        with open_checkpoints(tmp_path) as checkpoints:
            step = checkpoints.latest_step()
            assert step is not None
            assert step >= last + 2
            restored = checkpoints.restore(abstract(make_state(0, width=1 << 18)))
        assert_same(restored, make_state(step, width=1 << 18))
        last = step
    assert not list(folder.glob("*tmp*"))  # leftovers are cleared away


FILL_THE_DISK = """
import resource
checkpoints = open_checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, make_state(1))
checkpoints.wait()
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
try:
    checkpoints.save(2, make_state(2, width=1 << 18))
    if sys.argv[2] == "save":
        checkpoints.save(3, make_state(3))
    else:
        getattr(checkpoints, sys.argv[2])()
except RunError as e:
    print("RunError:", e)
"""


@pytest.mark.slow
@pytest.mark.parametrize("call", ["wait", "close", "save"])
def test_full_disk_is_told_and_older_checkpoints_are_good(tmp_path, call):
    process = start(FILL_THE_DISK, tmp_path, call)
    output, _ = process.communicate(timeout=120)
    told = [line for line in output.splitlines() if line.startswith("RunError:")]
    assert told, output
    assert "File too large" in told[0]
    assert "older checkpoints are still good: 1" in told[0]
    with open_checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        assert_same(checkpoints.restore(abstract(make_state(0))), make_state(1))
