"""A trace of the steps asked for, and of no others."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from personmae_jax.config import ProfileConfig
from personmae_jax.engine.profiling import Trace


def run(trace: Trace, steps, is_on, recorded):
    with trace:
        for step in steps:
            trace.before(step)
            if is_on:
                recorded.append(step)
            trace.after(step, jnp.zeros(()))


def test_exactly_the_steps_asked_for_are_recorded(tmp_path, monkeypatch):
    is_on, recorded = [], []

    @contextlib.contextmanager
    def record(_):
        is_on.append(True)
        yield
        is_on.clear()

    monkeypatch.setattr(jax.profiler, "trace", record)
    cfg = ProfileConfig(start_step=4, num_steps=3)
    run(Trace(cfg, epath.Path(tmp_path)), range(1, 10), is_on, recorded)
    assert recorded == [4, 5, 6]
    run(Trace(cfg, epath.Path(tmp_path)), range(1, 6), is_on, recorded)
    assert not is_on  # a run that ends earlier stops it too


@pytest.mark.parametrize("start_step", [None, 100])
def test_nothing_is_recorded_unless_asked(tmp_path, monkeypatch, start_step):
    monkeypatch.setattr(jax.profiler, "trace", pytest.fail)
    cfg = ProfileConfig(start_step=start_step)
    run(Trace(cfg, epath.Path(tmp_path)), range(1, 10), [], [])
    run(Trace(ProfileConfig(start_step=2), None), range(1, 10), [], [])


def test_tensorboard_finds_the_trace(tmp_path):
    with Trace(ProfileConfig(start_step=1, num_steps=1), epath.Path(tmp_path)) as trace:
        trace.before(1)
        trace.after(1, jax.jit(lambda x: x + 1)(jnp.ones(8)))
    found = [*(tmp_path / "tensorboard/plugins/profile").glob("*/*.xplane.pb")]
    assert len(found) == 1
    assert b"jit" in found[0].read_bytes()
