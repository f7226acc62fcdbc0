"""The host loop of fine-tuning: data, step, retrieval scores, checkpoints."""

import contextlib
import dataclasses
import gc

import jax

from personmae_jax import sharding
from personmae_jax.config_finetune import FinetuneConfig, check_finetuning
from personmae_jax.engine.checkpoint import Checkpoints, has_checkpoint
from personmae_jax.engine.storage import open_path
from personmae_jax.engine.workdir import Workdir
from personmae_jax.finetune.init import Start, read_encoder
from personmae_jax.finetune.monitor import Evaluator
from personmae_jax.finetune.report import FinetuneReport
from personmae_jax.finetune.sampling import FinetuneBatches, num_cameras, num_identities
from personmae_jax.finetune.step import FinetuneState, Finetuning, build
from personmae_jax.pretrain.train_loop import (
    device_errors,
    keep_compiled,
    say_end,
    say_nothing_to_do,
)
from personmae_jax.reid.datasets import ReidDataset


def run(cfg: FinetuneConfig, workdir: str, dataset: ReidDataset) -> int:
    """Fine-tunes to the last step or until interrupted; resumes what `workdir` holds.

    Args:
      cfg: The settings, settled and checked.
      workdir: A local folder or gs://...
      dataset: Whom to train on and to seek, checked.

    Returns:
      The exit code, FINISHED or INTERRUPTED.

    Raises:
      ConfigError: The settings do not fit the devices, the workdir or what the encoder
        starts from.
      RunError: The run had to stop. Checkpoints saved before are good.
    """
    check_finetuning(cfg, jax.device_count())
    # Before the workdir is this run's: what is not there is told, and can be mended.
    source = None if has_checkpoint(workdir) else read_encoder(cfg)
    finetuning = build(
        cfg,
        sharding.make_mesh(cfg.mesh),
        num_images=len(dataset.train),
        num_identities=num_identities(dataset),
        num_cameras=num_cameras(dataset),
    )
    num_steps = finetuning.num_steps
    path, is_main = open_path(workdir), jax.process_index() == 0
    keep_compiled(path)
    with contextlib.ExitStack() as stack:
        lock = None
        if is_main:
            lock = stack.enter_context(
                Workdir(
                    workdir,
                    cfg,
                    num_records=len(dataset.train),
                    num_steps=num_steps,
                    num_identities=num_identities(dataset),
                )
            )
        checkpoints = stack.enter_context(
            Checkpoints(path, keep=cfg.checkpoint.keep, config=dataclasses.asdict(cfg))
        )
        start = checkpoints.latest_step() or 0
        if start >= num_steps:
            return say_nothing_to_do(path, start)
        if start:
            state = checkpoints.restore(finetuning.abstract_state, start)
        else:
            state = _initial_state(finetuning, source or read_encoder(cfg))
        if is_main:
            print(_describe(finetuning, dataset, start), flush=True)
        batches = FinetuneBatches(
            dataset, cfg, host=jax.process_index(), num_hosts=jax.process_count()
        )
        stream = stack.enter_context(
            contextlib.closing(batches.iterate(start, num_steps))
        )
        rows = stack.enter_context(FinetuneReport(finetuning, path, start, is_main))
        checkpoints.pin(rows.best_step)
        evaluate = Evaluator(finetuning, dataset)
        every = max(
            1, round(cfg.eval.every_epochs * len(dataset.train) / cfg.batch_size)
        )
        with device_errors("a smaller --config.eval.batch_size"):
            last = train(
                *(finetuning, state, start, stream, rows, checkpoints, lock),
                *(evaluate, every),
            )
    return say_end(last, num_steps, rows.summarise)


def train(
    finetuning: Finetuning,
    state: FinetuneState,
    start: int,
    stream,
    rows: FinetuneReport,
    checkpoints: Checkpoints,
    lock: Workdir | None,
    evaluate: Evaluator,
    evaluate_every: int,
) -> int:
    """The steps after `start`, two of them in flight; returns the last, saved."""
    cfg, num_steps = finetuning.cfg, finetuning.num_steps
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, num_steps + 1):
            batch = sharding.to_devices(next(stream), finetuning.mesh)
            state, metrics = finetuning.train_step(state, batch)
            gc.enable()  # the launcher has turned it off
            rows.note(step, metrics)
            is_evaluated = step == num_steps or step % evaluate_every == 0
            is_last = step == num_steps or checkpoints.reached_preemption(step)
            if is_evaluated or is_last or step % cfg.checkpoint.every_steps == 0:
                rows.check()  # only what was seen finite is scored or saved
                if is_evaluated:
                    rows.add_scores(*evaluate(state))
                    checkpoints.pin(rows.best_step)
                rows.write(state.params if step == num_steps else None)
                rows.flush()
                if lock is not None:
                    lock.check_held()
                checkpoints.save(step, state)
            if is_last:
                break
    return step


def _initial_state(finetuning: Finetuning, source: Start) -> FinetuneState:
    """The state before the first step; says what the encoder is."""
    encoder, notes = source
    if jax.process_index() == 0:
        print(*notes, sep="\n", flush=True)
    if encoder is None:
        return finetuning.init_state()
    return finetuning.init_state(sharding.replicate(encoder, finetuning.mesh))


def _describe(finetuning: Finetuning, dataset: ReidDataset, start: int) -> str:
    cfg, devices = finetuning.cfg, finetuning.mesh.devices
    encoder, data, sampling = cfg.encoder, cfg.data, cfg.sampling
    first = f"from step {start} " if start else ""
    return (
        f"ViT {encoder.width}/{encoder.depth}/{encoder.num_heads} on {data.height} x "
        f"{data.width} pixels, {len(dataset.train):,} images of "
        f"{num_identities(dataset):,} people, {len(dataset.query):,} queries in "
        f"{len(dataset.gallery):,}; {first}to step {finetuning.num_steps:,}, "
        f"{sampling.identities} x {sampling.images} images a step, on {devices.size} "
        f"{devices.flat[0].device_kind}; compiling ..."
    )
