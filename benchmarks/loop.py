"""The train loop against its bare step, with real batches: who waits for whom?

In turn, in one run: a few steps of `loop.train`, with its pipeline, transfers,
report and checks; and as many calls of the step on a batch that is on the device
already. Prints the images/s of both, and the host's time a step beside dispatching it:
CPU time of the loop's thread, so neither waiting for the devices nor what else this
machine does.

Run: python benchmarks/loop.py --config=configs/vitb.py --config.train.batch_size=8
  --config.data.source=folder --config.data.path=IMAGES
"""

import contextlib
import pathlib
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "launch"))

import command_line  # launch/ puts the repository on the path

_CONFIG = command_line.define_config()
_ROUNDS, _STEPS = 3, 10  # of each kind; a round before them does not count


class _Pause:
    """In the place of checkpoints: every few steps the loop hands its state out."""

    def __init__(self):
        self.state = None

    def reached_preemption(self, step: int) -> bool:
        return step % _STEPS == 0

    def save(self, step: int, state) -> None:
        self.state = state


def main() -> None:
    import jax
    from etils import epath

    from personmae_jax import sharding
    from personmae_jax.data.records import open_records
    from personmae_jax.engine import loop
    from personmae_jax.engine.profiling import Trace
    from personmae_jax.engine.rows import Rows
    from personmae_jax.engine.training import Streams
    from personmae_jax.pretrain.program import build
    from personmae_jax.pretrain.run import make_training

    cfg = _CONFIG()
    program = build(cfg, sharding.make_mesh(cfg.mesh), 1000 * _STEPS)
    training = make_training(cfg, program, open_records(cfg.data))
    pause, state = _Pause(), program.init_state()
    looped, bare, own, dispatch = [], [], [], []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        streams = stack.enter_context(Streams(training, 0))
        kept = stack.enter_context(
            Rows(
                *(program, epath.Path(folder), 0),
                count_images=training.count_images,
                warn=training.warn,
            )
        )
        for number in range(_ROUNDS + 1):
            start, busy = time.perf_counter(), time.thread_time()
            loop.train(
                *(training, state, number * _STEPS, streams, kept),
                *(pause, None, Trace(cfg.profile, None)),
            )
            looped.append((time.perf_counter() - start) / _STEPS)
            own.append((time.thread_time() - busy) / _STEPS)
            rows = next(streams)
            batch = sharding.to_devices(
                {name: rows[name] for name in program.abstract_batch},
                program.mesh,
            )
            state = jax.block_until_ready(pause.state)
            start, busy = time.perf_counter(), time.thread_time()
            metrics = None
            for _ in range(_STEPS):
                state, new_metrics = program.train_step(state, batch)
                jax.block_until_ready(metrics)  # as the loop, two steps in flight
                metrics = new_metrics
            jax.block_until_ready(metrics)
            bare.append((time.perf_counter() - start) / _STEPS)
            dispatch.append((time.thread_time() - busy) / _STEPS)
    looped, bare, own, dispatch = (
        statistics.median(times[1:]) for times in (looped, bare, own, dispatch)
    )
    b = cfg.train.batch_size
    print(
        f"loop       {b / looped:8.2f} images/s, {bare / looped:.1%} of the bare step's"
    )
    print(f"bare step  {b / bare:8.2f} images/s")
    print(f"host       {(own - dispatch) * 1e3:8.2f} ms a step, and")
    print(f"           {dispatch * 1e3:8.2f} ms to dispatch the step")


if __name__ == "__main__":
    command_line.run(main)
