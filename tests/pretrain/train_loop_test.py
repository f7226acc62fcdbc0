"""Promises about the host loop: the devices never wait for the host."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import pytest
from tiny import tiny_config

from personmae_jax import sharding
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import open_records
from personmae_jax.engine.checkpoint import Checkpoints
from personmae_jax.engine.profiling import Trace
from personmae_jax.pretrain import experiment as experiments
from personmae_jax.pretrain import train_loop
from personmae_jax.pretrain.report import Report

_NUM_STEPS = 5


class _NoCheckpoints(Checkpoints):
    def __init__(self):
        pass

    def reached_preemption(self, step: int) -> bool:
        return step == _NUM_STEPS

    def save(self, step: int, state) -> None:
        pass


@pytest.fixture
def collector_off():
    """As a launcher starts."""
    gc.disable()
    yield
    gc.enable()


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
    experiment = dataclasses.replace(
        experiments.build(cfg, sharding.make_mesh(cfg.mesh), 750),
        train_step=noted_step,
    )
    records = open_records(cfg.data)
    batches = PretrainBatches(records, cfg)
    state, stream = experiment.init_state(), batches.iterate(0)
    monkeypatch.setattr(sharding, "to_devices", noted_put)
    monkeypatch.setattr(jax, "block_until_ready", noted_wait)
    with Report(experiment, None, records, batches, 0) as report:
        train_loop.train(
            experiment,
            state,
            0,
            stream,
            report,
            _NoCheckpoints(),
            None,
            Trace(cfg.profile, None),
        )
    stream.close()
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


def test_the_first_step_turns_the_garbage_collector_on(collector_off, events):
    assert gc.isenabled()
