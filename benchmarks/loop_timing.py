"""The engine's loop against the bare step of one training, in turn, in one run."""

import contextlib
import statistics
import tempfile
import time

import jax
from etils import epath

from personmae_jax import sharding
from personmae_jax.engine import loop
from personmae_jax.engine.profiling import Trace
from personmae_jax.engine.rows import Rows
from personmae_jax.engine.training import Training


class _Pause:
    """In the place of checkpoints: every few steps the loop hands its state out."""

    def __init__(self, every: int):
        self._every = every
        self.state = None

    def reached_preemption(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, state) -> None:
        self.state = state


def compare(training: Training, state, *, steps: int, pieces: int) -> None:
    """Runs the loop for `steps`, then the step on one batch as often; prints both.

    That `pieces` times, and once before, which does not count.

    The loop has its pipeline, transfers, report and checks; the bare step's batch is on
    the device already. The host's time is CPU time of the loop's thread, so neither
    waiting for the devices nor what else this machine does.
    """
    program, cfg = training.program, training.program.cfg
    pause = _Pause(steps)
    looped, bare, own, dispatch = [], [], [], []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        streams = stack.enter_context(loop.Streams(training, 0))
        kept = stack.enter_context(Rows(training, epath.Path(folder), 0))
        for number in range(pieces + 1):
            start, busy = time.perf_counter(), time.thread_time()
            loop.train(
                *(training, state, number * steps, streams, kept),
                *(pause, None, Trace(cfg.profile, None)),
            )
            looped.append((time.perf_counter() - start) / steps)
            own.append((time.thread_time() - busy) / steps)
            rows = next(streams)
            batch = sharding.to_devices(
                {name: rows[name] for name in program.abstract_batch},
                program.mesh,
            )
            state = jax.block_until_ready(pause.state)
            start, busy = time.perf_counter(), time.thread_time()
            metrics = None
            for _ in range(steps):
                state, new_metrics = program.train_step(state, batch)
                jax.block_until_ready(metrics)  # as the loop, two steps in flight
                metrics = new_metrics
            jax.block_until_ready(metrics)
            bare.append((time.perf_counter() - start) / steps)
            dispatch.append((time.thread_time() - busy) / steps)
    looped, bare = looped[1:], bare[1:]
    shares = " ".join(f"{b / a:.1%}" for a, b in zip(looped, bare, strict=True))
    own, dispatch = statistics.median(own[1:]), statistics.median(dispatch[1:])
    in_loop, alone = statistics.median(looped), statistics.median(bare)
    size = program.batch_size
    print(f"loop       {size / in_loop:8.2f} images/s, {alone / in_loop:.1%} of those")
    print(f"           of the bare step; piece by piece {shares}")
    print(f"bare step  {size / alone:8.2f} images/s")
    print(f"host       {(own - dispatch) * 1e3:8.2f} ms a step, and")
    print(f"           {dispatch * 1e3:8.2f} ms to dispatch the step")
