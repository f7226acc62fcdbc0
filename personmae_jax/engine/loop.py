"""The one host loop of every training: data, step, rows, scores, checkpoints."""

import contextlib
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
from etils import epath

from personmae_jax import sharding
from personmae_jax.data.batches import Batch, HostBatches
from personmae_jax.engine import distributed
from personmae_jax.engine.checkpoint import Checkpoints, has_checkpoint
from personmae_jax.engine.curves import write_curves
from personmae_jax.engine.profiling import Trace
from personmae_jax.engine.rows import Rows
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.training import RoundError, Rounds, Start, Training
from personmae_jax.engine.workdir import (
    Workdir,
    check_processes_agree,
    check_processes_share,
)
from personmae_jax.errors import Closing, RunError

FINISHED, INTERRUPTED = 0, 75  # exit codes; 75 is EX_TEMPFAIL: start again


class Streams(Closing, Iterator[Batch]):
    """The batches of a run, whether one stream of them or one in each round."""

    def __init__(self, training: Training, start: int):
        """Begins at once to make the batch after `start`, if no round has to."""
        super().__init__()
        self._num_steps = training.program.num_steps
        self._first = start + 1
        self._rounds: Rounds | None = None
        if isinstance(training.batches, HostBatches):
            self._open(training.batches, start, self._num_steps)
        else:
            self._rounds = training.batches

    def __next__(self) -> Batch:
        return next(self._stream)

    def before(self, step: int, state: Any, rows: Rows) -> Any:
        """Begins a round if one is due before `step`; returns the state."""
        if self._rounds is None or not (
            step == self._first or self._rounds.begins(step)
        ):
            return state
        self._closing.close()
        with rows.paused():  # what was seen finite makes the labels
            state, batches, numbers = self._rounds.open(step, state)
        rows.add_to_next(numbers)
        # What is made ahead ends with the round: the next one makes it anew.
        following = range(step + 1, self._num_steps + 1)
        ends = (later - 1 for later in following if self._rounds.begins(later))
        self._open(batches, step - 1, next(ends, self._num_steps))
        return state

    def _open(self, batches: HostBatches, start: int, stop: int) -> None:
        self._stream = self._closing.enter_context(
            contextlib.closing(batches.iterate(start, stop))
        )


def run(training: Training, workdir: str) -> int:
    """Trains to the last step or until interrupted; resumes what `workdir` holds.

    Returns:
      The exit code, FINISHED or INTERRUPTED.

    Raises:
      ConfigError: The settings or the data do not fit the workdir.
      RunError: The run had to stop: a non-finite loss, too many bad images, a full
        disk. Checkpoints saved before are good.
    """
    program, is_main = training.program, jax.process_index() == 0
    cfg, num_steps = program.cfg, program.num_steps
    facts = {"num_steps": num_steps, **training.data}
    check_processes_agree(cfg, facts)
    path = open_path(workdir)
    keep_compiled(path)
    with contextlib.ExitStack() as stack:
        lock = None
        if is_main:
            lock = stack.enter_context(Workdir(workdir, cfg, **facts))
        with distributed.device_errors(training.memory_hint):  # process 0 may have left
            check_processes_share(path)
        checkpoints = stack.enter_context(
            Checkpoints(path, keep=cfg.checkpoint.keep, config=dataclasses.asdict(cfg))
        )
        start = checkpoints.latest_step()
        best = None
        if training.scorer is not None:
            training.scorer.restore(path, start or 0)
            best = training.scorer.best_step
            checkpoints.pin(best or 0)
        if start is not None and start >= num_steps:
            if best != 0:  # rows that are lost do not tell which one to keep
                checkpoints.prune()
            if is_main:
                write_curves(path)  # a run that was killed at its end has none
                print(
                    f"{path} holds a finished run of {start} steps: nothing to do. "
                    "For a new run name another --workdir."
                )
            return FINISHED
        # The step is compiled and the first batches are made beside the initial state;
        # it is traced before that, since two threads of Python would share one core.
        lowered: Any = program.train_step
        lowered = lowered.lower(program.abstract_state, program.abstract_batch)
        compiled = stack.enter_context(futures.ThreadPoolExecutor(1)).submit(
            lowered.compile
        )
        streams = stack.enter_context(Streams(training, start or 0))
        if start is None:
            start, state = 0, initial_state(training)
            if training.keep_initial:
                checkpoints.save(0, state)
        else:
            state = checkpoints.restore(program.abstract_state, start)
        if is_main:
            print(_describe(training, start), flush=True)
        hint = (
            f"{training.memory_hint}, --config.train.remat=block, more devices, or "
            "another --workdir with a smaller batch"
        )
        with distributed.device_errors(hint):
            ready = dataclasses.replace(program, train_step=compiled.result())
        rows = stack.enter_context(Rows(training, path if is_main else None, start))
        trace = stack.enter_context(Trace(cfg.profile, path if is_main else None))
        with distributed.device_errors(hint):
            last = train(
                *(dataclasses.replace(training, program=ready), state, start),
                *(streams, rows, checkpoints, lock, trace),
            )
    if last < num_steps:
        if is_main:
            print(
                f"Interrupted: saved step {last} of {num_steps}; start again to go on."
            )
        return INTERRUPTED
    if is_main:
        write_curves(path)
        print(training.summary(path))
    return FINISHED


def train(
    training: Training,
    state: Any,
    start: int,
    streams: Streams,
    rows: Rows,
    checkpoints: Checkpoints,
    lock: Workdir | None,
    trace: Trace,
) -> int:
    """The steps after `start`, two of them in flight.

    While the devices compute one step, the next one's batch is on its way to them:
    the host waits for a step once the one after it has been dispatched, and at once
    only for a picture, scores, a checkpoint, a new round and the end.

    Returns:
      The last step, which is saved: `num_steps` unless interrupted.
    """
    program, scorer, step = training.program, training.scorer, start
    cfg, num_steps = program.cfg, program.num_steps

    def save(step: int, state: Any) -> None:
        # Only what was seen finite is saved, so the last checkpoint is good.
        rows.write(state.params if step == num_steps else None)
        rows.flush()
        if lock is not None:
            lock.check_held()
        checkpoints.save(step, state)

    is_saved = True  # or `start` is 0
    # What moves to or from a device by accident would stall every step.
    with jax.transfer_guard("disallow"):
        if scorer is not None and start == 0 and scorer.is_due(0):
            rows.add_scores(0, functools.partial(scorer, 0, state))
        for step in range(start + 1, num_steps + 1):
            try:
                state = streams.before(step, state, rows)
            except RoundError:
                if not is_saved:
                    save(step - 1, state)
                raise
            trace.before(step)
            asked_at = time.monotonic()
            batch = next(streams)
            data_seconds = time.monotonic() - asked_at
            on_devices = sharding.to_devices(
                {name: batch[name] for name in program.abstract_batch}, program.mesh
            )
            state, metrics = program.train_step(state, on_devices)
            trace.after(step, metrics)
            rows.note(step, metrics, batch, data_seconds)
            # Asked once a step on every host, or they would not agree on the step.
            is_last = step == num_steps or checkpoints.reached_preemption(step)
            is_drawn = step == num_steps or step % cfg.log.pictures_every_steps == 0
            if training.draw is not None and is_drawn:
                rows.write_picture(step, training.draw(step, state))
            is_saved = is_last or step % cfg.checkpoint.every_steps == 0
            if scorer is not None and scorer.is_due(step):
                try:
                    rows.add_scores(step, functools.partial(scorer, step, state))
                except RunError:  # such as an image that cannot be used
                    if jax.process_count() == 1:  # others would be waited for, in vain
                        save(step, state)
                    raise
                if scorer.best_step is not None:
                    checkpoints.pin(scorer.best_step)
                    is_saved = True  # it may be the best
            if is_saved:
                save(step, state)
            if is_last:
                break
    return step


def read_early(workdir: str, start: Callable[[], Start]) -> Callable[[], Start]:
    """Calls `start` at once for a new run; returns what gives its answer again.

    So a file that does not fit is told before any device work, and before the workdir
    is this run's: it can be replaced.
    """
    cached = functools.cache(start)
    if not has_checkpoint(workdir):
        cached()
    return cached


def initial_state(training: Training) -> Any:
    """The state before the first step; says what the encoder starts from."""
    encoder, notes = training.start()
    if notes and jax.process_index() == 0:
        print(*notes, sep="\n", flush=True)
    program = training.program
    if encoder is None:
        return program.init_state()
    return program.init_state(sharding.replicate(encoder, program.mesh))


def _describe(training: Training, start: int) -> str:
    program = training.program
    encoder, data = program.cfg.encoder, program.cfg.data
    devices = program.mesh.devices
    first = f"from step {start} " if start else ""
    return (
        f"ViT {encoder.width}/{encoder.depth}/{encoder.num_heads} on {data.height} x "
        f"{data.width} pixels, {training.about}; {first}to step "
        f"{program.num_steps:,}, {program.batch_size:,} images a step, on "
        f"{devices.size} {devices.flat[0].device_kind}; compiling ..."
    )


def keep_compiled(workdir: epath.Path) -> None:
    """Lets the next start find what this one compiles, wherever it runs.

    JAX_COMPILATION_CACHE_DIR, if set, says where instead.
    """
    # XLA's own caches are written by C++ that knows no gs://, and by every run at once.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    # It costs a compilation; what else cannot be written there ends the run in words.
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
