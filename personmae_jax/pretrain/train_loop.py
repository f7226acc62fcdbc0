"""The host loop: data, step, metrics, pictures, retrieval scores, checkpoints."""

import contextlib
import dataclasses
import functools
import gc
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent import futures

import jax
from etils import epath

from personmae_jax import sharding
from personmae_jax.config import Config
from personmae_jax.config_check import check
from personmae_jax.data.pipeline import PretrainBatches
from personmae_jax.data.records import Records
from personmae_jax.engine.checkpoint import Checkpoints, has_checkpoint
from personmae_jax.engine.profiling import Trace
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.workdir import Workdir
from personmae_jax.errors import RunError, first_line
from personmae_jax.pretrain import experiment as experiments
from personmae_jax.pretrain.experiment import Experiment
from personmae_jax.pretrain.monitor import Monitor, open_people
from personmae_jax.pretrain.report import Report, summarise
from personmae_jax.pretrain.state import TrainState
from personmae_jax.pytorch import importer
from personmae_jax.pytorch.importer import Imported

_XLA_STATUS = re.compile("UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED")

FINISHED, INTERRUPTED = 0, 75  # exit codes; 75 is EX_TEMPFAIL: start again


def run(cfg: Config, workdir: str, records: Records) -> int:
    """Trains to the last step or until interrupted; resumes what `workdir` holds.

    Args:
      cfg: The settings, checked.
      workdir: A local folder or gs://...
      records: The encoded images.

    Returns:
      The exit code, FINISHED or INTERRUPTED.

    Raises:
      ConfigError: The settings do not fit the devices, the data, the workdir, the
        folder of config.eval or the file of config.init.
      RunError: The run had to stop: a non-finite loss, too many bad images, a full
        disk. Checkpoints saved before are good.
    """
    num_steps = experiments.count_steps(cfg, len(records))
    people, imported = open_people(cfg), None
    if cfg.init.torch_weights is not None and not has_checkpoint(workdir):
        # Before any device work: a file that does not fit is told at once.
        imported = importer.read_encoder(cfg)
    check(cfg, jax.device_count())  # before a mesh is made of them
    experiment = experiments.build(cfg, sharding.make_mesh(cfg.mesh), num_steps)
    path, is_main = open_path(workdir), jax.process_index() == 0
    keep_compiled(path)
    with contextlib.ExitStack() as stack:
        lock = None
        if is_main:
            lock = stack.enter_context(
                Workdir(workdir, cfg, num_records=len(records), num_steps=num_steps)
            )
        checkpoints = stack.enter_context(
            Checkpoints(path, keep=cfg.checkpoint.keep, config=dataclasses.asdict(cfg))
        )
        start = checkpoints.latest_step()
        if start is not None and start >= num_steps:
            checkpoints.prune()
            return say_nothing_to_do(path, start)
        # The step is compiled and the first batches are made beside the initial state;
        # it is traced before that, since two threads of Python would share one core.
        lowered = experiment.train_step.lower(
            experiment.abstract_state, experiment.abstract_batch
        )
        compiled = stack.enter_context(futures.ThreadPoolExecutor(1)).submit(
            lowered.compile
        )
        batches = PretrainBatches(
            records, cfg, host=jax.process_index(), num_hosts=jax.process_count()
        )
        stream = stack.enter_context(
            contextlib.closing(batches.iterate(start or 0, num_steps))
        )
        if start is None:
            start, state = 0, _initial_state(experiment, imported)
            checkpoints.save(0, state)
        else:
            state = checkpoints.restore(experiment.abstract_state, start)
        if is_main:
            print(_describe(experiment, len(records), start), flush=True)
        report = stack.enter_context(
            Report(experiment, path if is_main else None, records, batches, start)
        )
        trace = stack.enter_context(Trace(cfg.profile, path if is_main else None))
        with device_errors("a larger --config.train.accumulate"):
            experiment = dataclasses.replace(experiment, train_step=compiled.result())
            last = train(
                *(experiment, state, start, stream, report, checkpoints, lock, trace),
                None if people is None else Monitor(experiment, people),
            )
    return say_end(last, num_steps, lambda: summarise(path, num_steps))


def say_nothing_to_do(path: epath.Path, step: int) -> int:
    """Says that the run in `path` is finished; returns the exit code."""
    print(
        f"{path} holds a finished run of {step} steps: nothing to do. "
        "For a new run name another --workdir."
    )
    return FINISHED


def say_end(last: int, num_steps: int, summary: Callable[[], str]) -> int:
    """Says once how a run has ended that saved step `last`; returns the exit code."""
    if jax.process_index() == 0:
        print(
            summary()
            if last == num_steps
            else f"Interrupted: saved step {last} of {num_steps}; start again to go on."
        )
    return FINISHED if last == num_steps else INTERRUPTED


def _initial_state(experiment: Experiment, imported: Imported | None) -> TrainState:
    """The state before the first step; says what an imported encoder is."""
    cfg = experiment.cfg
    if cfg.init.torch_weights is None:
        return experiment.init_state()
    imported = imported or importer.read_encoder(cfg)
    if jax.process_index() == 0:
        print(*imported.notes, sep="\n", flush=True)
    return experiment.init_state(sharding.replicate(imported.params, experiment.mesh))


@contextlib.contextmanager
def device_errors(hint: str) -> Iterator[None]:
    """Turns what devices and other processes do to a run into one line.

    Args:
      hint: What else saves memory there.

    Raises:
      RunError: The memory of a device does not suffice, or another process has died.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as e:  # XLA's come as either
        if "RESOURCE_EXHAUSTED" in str(e):
            raise RunError(
                f"out of memory on the device ({first_line(e)}); use a smaller batch, "
                f"{hint}, --config.train.remat=block, or more devices"
            ) from e
        if jax.process_count() == 1 or not _XLA_STATUS.match(str(e)):
            raise
        raise RunError(
            f"another process of this run has died or cannot be reached "
            f"({first_line(e)}); its log tells why; start all of them again to go "
            "on from the last checkpoint"
        ) from e


def keep_compiled(workdir: epath.Path) -> None:
    """Lets the next start find what this one compiles, wherever it runs.

    JAX_COMPILATION_CACHE_DIR, if set, says where instead.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.fspath(workdir / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def train(
    experiment: Experiment,
    state: TrainState,
    start: int,
    stream,
    report: Report,
    checkpoints: Checkpoints,
    lock: Workdir | None,
    trace: Trace,
    monitor: Monitor | None = None,
) -> int:
    """The steps after `start`, two of them in flight.

    While the devices compute one step, the next one's batch is on its way to them:
    nothing here waits for a step before the one after it has been dispatched, but for
    a picture, retrieval scores, a checkpoint and the end.

    Returns:
      The last step, which is saved: `num_steps` unless interrupted.
    """
    cfg, num_steps = experiment.cfg, experiment.num_steps
    with jax.transfer_guard("disallow"):
        if monitor is not None and start == 0:
            report.evaluate(0, functools.partial(monitor, state))
        for step in range(start + 1, num_steps + 1):
            trace.before(step)
            asked_at = time.monotonic()
            rows = next(stream)
            data_seconds = time.monotonic() - asked_at
            batch = sharding.to_devices(
                {name: rows[name] for name in experiment.abstract_batch},
                experiment.mesh,
            )
            state, metrics = experiment.train_step(state, batch)
            trace.after(step, metrics)
            report.note(step, metrics, rows, data_seconds)
            if step > start + 1:  # the first one is done
                gc.enable()  # the launcher has turned it off
            is_last = step == num_steps or checkpoints.reached_preemption(step)
            if step == num_steps or step % cfg.log.pictures_every_steps == 0:
                report.write_picture(step, state.params)
            if monitor is not None and monitor.is_due(step):
                report.evaluate(step, functools.partial(monitor, state))
            if is_last or step % cfg.checkpoint.every_steps == 0:
                # Only what was seen finite is saved, so the last checkpoint is good.
                report.write(state.params if step == num_steps else None)
                report.flush()
                if lock is not None:
                    lock.check_held()
                checkpoints.save(step, state)
            if is_last:
                break
    return step


def _describe(experiment: Experiment, num_records: int, start: int) -> str:
    cfg, devices = experiment.cfg, experiment.mesh.devices
    encoder, data = cfg.encoder, cfg.data
    first = f"from step {start} " if start else ""
    return (
        f"ViT {encoder.width}/{encoder.depth}/{encoder.num_heads} on {data.height} x "
        f"{data.width} pixels, {num_records:,} {data.source} records; {first}to step "
        f"{experiment.num_steps:,}, {cfg.train.batch_size:,} images a step, on "
        f"{devices.size} {devices.flat[0].device_kind}; compiling ..."
    )
