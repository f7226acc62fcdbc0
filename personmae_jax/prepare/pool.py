"""All cores at the shards of a preparation; no process outlives its parent."""

import concurrent.futures
import contextlib
import logging as stdlib_logging
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from absl import flags, logging

from personmae_jax.data.workers import exit_with_parent, num_cores, signals_held
from personmae_jax.engine.progress import Progress
from personmae_jax.errors import RunError, without_control
from personmae_jax.prepare.plan import Plan


def run_shards(
    function: Callable[[str, int], Any],
    folder: str,
    plan: Plan,
    shards: Sequence[int],
    num_processes: int | None = None,
) -> list:
    """Runs `function(folder, shard)` for every shard in processes of this machine.

    Returns:
      What it returned, in the order of the shards; `num_processes` None: one a core.

    Raises:
      RunError: One of them failed, or its process was killed.
    """
    if not shards:
        return []
    count = min(num_processes or num_cores(), len(shards))
    try:
        with worker_pool(count) as pool:
            futures = [pool.submit(function, folder, shard) for shard in shards]
            _show_progress(plan, dict(zip(futures, shards, strict=True)))
            return [future.result() for future in futures]
    except BrokenProcessPool:
        raise RunError(
            "a worker process was killed: too little memory for --processes="
            f"{count}, or a damaged LMDB; start again with fewer to go on"
        ) from None


def _show_progress(plan: Plan, shards: dict[concurrent.futures.Future, int]) -> None:
    """Waits for all futures; the first that fails raises."""
    start = done = plan.num_members - sum(map(plan.num_rows, shards.values()))
    begun = time.monotonic()
    with Progress(plan.num_members, start, unit="image") as progress:
        progress.show(start, "")
        for future in concurrent.futures.as_completed(shards):
            future.result()
            done += plan.num_rows(shards[future])
            rate = (done - start) / max(time.monotonic() - begun, 1e-9)
            progress.show(done, f"{rate:,.0f} images/s")


class _Pool(concurrent.futures.ProcessPoolExecutor):
    def submit(self, *args: Any, **kwargs: Any) -> concurrent.futures.Future:
        with signals_held():  # the first calls start the processes
            return super().submit(*args, **kwargs)


@contextlib.contextmanager
def worker_pool(
    num_processes: int,
) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool whose processes are killed when its block is left by an exception."""
    others = set(multiprocessing.active_children())
    pool = _Pool(
        num_processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
    )
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    exit_with_parent()
    flags.FLAGS.mark_as_parsed()  # or absl logs that it logs before
    logging.use_absl_handler()
    logging.get_absl_handler().python_handler.addFilter(_escape)


def _escape(record: stdlib_logging.LogRecord) -> bool:
    """What the launcher's streams do to names that a message quotes."""
    record.msg, record.args = without_control(record.getMessage()), None
    return True
