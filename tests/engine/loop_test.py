"""Promises about the host loop: the devices never wait for the host, rounds resume."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiny import tiny_config

from personmae_jax import sharding
from personmae_jax.data.batches import HostBatches
from personmae_jax.data.records import open_records
from personmae_jax.engine import loop
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.engine.profiling import Trace
from personmae_jax.engine.program import assemble
from personmae_jax.engine.rows import Rows
from personmae_jax.engine.training import Training
from personmae_jax.pretrain import program as programs
from personmae_jax.pretrain.run import make_training

_NUM_STEPS = 5


class _InMemory(Checkpoints):
    """Keeps what is saved in memory; stops after the steps named."""

    def __init__(self, *stops: int):
        self.saved, self._stops = {}, stops

    def reached_preemption(self, step: int) -> bool:
        return step in self._stops

    def save(self, step: int, state) -> None:
        self.saved[step] = jax.device_get(state)


def train(training, start, state, checkpoints, workdir=None) -> None:
    program = training.program
    with contextlib.ExitStack() as stack:
        streams = stack.enter_context(loop.Streams(training, start))
        rows = stack.enter_context(Rows(training, workdir, start))
        trace = Trace(program.cfg.profile, None)
        loop.train(training, state, start, streams, rows, checkpoints, None, trace)


@pytest.fixture
def events(monkeypatch):
    """What the loop does, in order: ("put" | "step" | "wait", number of the step)."""
    events = []
    metrics = [{"loss": jnp.zeros(())} for _ in range(_NUM_STEPS)]
    put, wait = sharding.to_devices, jax.block_until_ready

    def noted_put(*args):
        events.append(("put", sum(name == "put" for name, _ in events) + 1))
        return put(*args)

    def noted_step(state, _):
        step = sum(name == "step" for name, _ in events) + 1
        events.append(("step", step))
        return state, metrics[step - 1]

    def noted_wait(tree):
        step = [tree is one for one in metrics].index(True) + 1
        if ("wait", step) not in events:
            events.append(("wait", step))
        return wait(tree)

    cfg = tiny_config()
    program = programs.build(cfg, sharding.make_mesh(cfg.mesh), 750)
    state = program.init_state()
    program = dataclasses.replace(program, train_step=noted_step)
    monkeypatch.setattr(sharding, "to_devices", noted_put)
    monkeypatch.setattr(jax, "block_until_ready", noted_wait)
    training = make_training(cfg, program, open_records(cfg.data))
    train(training, 0, state, _InMemory(_NUM_STEPS))
    return events


def test_the_next_batch_is_on_its_way_before_a_step_is_waited_for(events):
    order = {event: place for place, event in enumerate(events)}
    for step in range(1, _NUM_STEPS):
        assert order["put", step + 1] < order["wait", step]
        assert order["step", step + 1] < order["wait", step]


def test_at_most_two_steps_are_in_flight(events):
    order = {event: place for place, event in enumerate(events)}
    for step in range(1, _NUM_STEPS - 1):
        assert order["wait", step] < order["put", step + 2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    params: jax.Array
    label: jax.Array


class _Numbers(HostBatches):
    """The batch of a step is the number of the step and the label of its round."""

    def __init__(self, label: float):
        super().__init__(8, num_threads=1, num_workers=0)
        self._label = label

    def begin(self, positions: range):
        value = np.full(8, positions.start // 8 + self._label, np.float32)
        return {"x": value}, lambda row: None


class _EveryThree:
    """Rounds of three steps, whose label is what the state has become."""

    def __init__(self):
        self.began = []

    def begins(self, step: int) -> bool:
        return step % 3 == 1

    def open(self, step, state):
        if not self.begins(step):
            return state, _Numbers(float(jax.device_get(state.label))), {}
        self.began.append(step)
        state = dataclasses.replace(state, label=jnp.copy(state.params))
        label = float(jax.device_get(state.label))
        return state, _Numbers(label), {"label": label}


def training_in_rounds(num_steps: int = 8) -> Training:
    cfg = tiny_config()
    cfg.log.every_steps = 100

    def step(state, batch):
        params = state.params * 0.5 + jnp.mean(batch["x"])
        return dataclasses.replace(state, params=params), {"loss": params}

    program = assemble(
        *(cfg, sharding.make_mesh(cfg.mesh)),
        num_steps=num_steps,
        batch_size=8,
        init=lambda _=None: _State(jnp.ones(()), jnp.zeros(())),
        step=step,
        batch={"x": jax.ShapeDtypeStruct((8,), np.float32)},
    )
    return Training(
        program=program,
        data={"num_records": 8},
        about="numbers",
        start=lambda: (None, ()),
        batches=_EveryThree(),
        summary=str,
        memory_hint="nothing",
    )


def test_a_round_is_resumed_with_what_it_learned_and_begins_no_second_time(tmp_path):
    whole, halves = training_in_rounds(), training_in_rounds()
    saved = _InMemory()
    train(whole, 0, whole.program.init_state(), saved, epath.Path(tmp_path))
    first, second = _InMemory(5), _InMemory()
    train(halves, 0, halves.program.init_state(), first)
    where = jax.tree.map(lambda x: x.sharding, halves.program.abstract_state)
    train(halves, 5, jax.device_put(first.saved[5], where), second)
    assert whole.batches.began == [1, 4, 7]
    assert halves.batches.began == [1, 4, 7]
    assert second.saved[8] == saved.saved[8]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = {row["step"]: row for row in map(json.loads, lines)}
    assert [step for step, row in rows.items() if "label" in row] == [1, 4, 7]


def test_steps_of_any_training_can_be_traced(tmp_path, monkeypatch):
    # One process that never joined a cluster is never asked to leave.
    monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)
    training = training_in_rounds(num_steps=3)
    training.program.cfg.profile.start_step = 2
    assert loop.run(training, str(tmp_path)) == loop.FINISHED
    assert [*(tmp_path / "tensorboard").rglob("*.xplane.pb")]


def test_a_run_killed_after_its_last_step_gets_its_curves_at_the_next_start(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Checkpoints, "reached_preemption", lambda self, step: False)
    assert loop.run(training_in_rounds(3), str(tmp_path)) == loop.FINISHED
    curves = tmp_path / "pictures" / "curves.png"
    drawn = curves.read_bytes()
    curves.unlink()
    assert loop.run(training_in_rounds(3), str(tmp_path)) == loop.FINISHED
    assert curves.read_bytes() == drawn


COMPILE_ON_A_FULL_DISK = """
import resource, sys
import jax
from etils import epath
from personmae_jax.engine.loop import keep_compiled
keep_compiled(epath.Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
jax.jit(lambda x: x + 1)(1.0)
"""


def test_a_cache_that_a_full_disk_does_not_take_is_no_news(tmp_path):
    environment = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE_ON_A_FULL_DISK, tmp_path],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert done.stderr == ""
