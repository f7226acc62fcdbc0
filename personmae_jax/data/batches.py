"""Streams of batches that are made ahead: batch k of host p is a function of (k, p).

The elements that grain, Google's data loader, handles are whole batches, whose rows a
pool of threads decodes straight into place. Stock `.batch` stacks and copies, which
doubles the cost of an image; a batch per thread would hold 16 batches in memory, and
bring the first one late.
"""

import copy
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent import futures

import grain
import numpy as np

from personmae_jax.data.workers import exit_with_parent, num_cores
from personmae_jax.errors import RunError

_BATCHES_AHEAD = 2  # held by this process, or by each worker

Batch = dict[str, np.ndarray]


class HostBatches:
    """The batches of one host; picklable, and read by many threads at once."""

    def __init__(
        self,
        batch_size: int,
        *,
        num_threads: int,
        num_workers: int,
        host: int = 0,
        num_hosts: int = 1,
    ):
        """Prepares the stream; nothing is read yet.

        Args:
          batch_size: Rows over all hosts.
          num_threads: That share the rows of a batch, at most one a core.
          num_workers: Worker processes, each with `num_threads`; 0: this process.
          host: This process's index, from 0.
          num_hosts: Number of processes, a divisor of `batch_size`; rows host,
            host + num_hosts, ... of every global batch belong to this one.
        """
        self._batch_size = batch_size
        # More than one a core only wait for each other.
        self._num_threads = min(num_threads, num_cores())
        self._num_workers = num_workers
        self._host = host
        self._num_hosts = num_hosts
        self._num_rows = batch_size // num_hosts
        self._pool = futures.ThreadPoolExecutor(self._num_threads)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_pool"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._pool = futures.ThreadPoolExecutor(self._num_threads)

    def begin(self, positions: range) -> tuple[Batch, Callable[[int], object]]:
        """The batch of these positions but for its images, and what fills a row.

        Args:
          positions: Of its rows in the endless stream of all batches' rows.
        """
        raise NotImplementedError

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of the global batch of one step."""
        first = step * self._batch_size
        stop = first + self._batch_size
        positions = range(first + self._host, stop, self._num_hosts)
        batch, fill_row = self.begin(positions)
        rows = range(len(positions))
        share = math.ceil(len(rows) / self._num_threads)
        tasks = [
            self._pool.submit(_fill, fill_row, rows[i : i + share])
            for i in range(0, len(rows), share)
        ]
        for task in tasks:
            task.result()
        return batch

    def iterate(self, start: int, stop: int | None = None) -> "BatchIterator":
        """The batches of steps start, start + 1, ..., stop - 1, decoded ahead.

        Workers, threads and memory are held until the iterator is closed. With
        `data.num_workers` the caller needs parsed absl flags and a real `__main__`.
        """
        return BatchIterator(self, range(start, sys.maxsize if stop is None else stop))


class BatchIterator(Iterator[Batch]):
    """Batches in order, made ahead in the background; close it when done."""

    def __init__(self, batches: HostBatches, steps: range):
        self._batches = copy.copy(batches)  # with threads of its own
        dataset = (
            grain.MapDataset.range(steps.start, steps.stop)
            .map(self._batches.__getitem__)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD
                )
            )
        )
        if batches._num_workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(batches._num_workers), _init_worker
            )
        self._iterator = iter(dataset)
        self._iterator.start_prefetch()
        # Runs at exit too: workers left to themselves would hold it up for seconds.
        self._stop = weakref.finalize(self, _stop, self._iterator, self._batches._pool)

    def __next__(self) -> Batch:
        """The next batch; raises RunError if a worker process was killed."""
        try:
            return next(self._iterator)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # grain's words
                raise
            raise RunError(
                "a data worker was killed, as a rule for want of memory; start again "
                "with the same command and fewer --config.data.num_workers (0: none)"
            ) from error

    def close(self) -> None:
        """Stops threads and worker processes; safe to call twice."""
        self._stop()
        # Grain's must be gone before the interpreter takes its modules apart.
        self._iterator = iter(())


def _init_worker(index: int, count: int) -> None:
    exit_with_parent()


def _stop(iterator: grain.DatasetIterator, pool: futures.ThreadPoolExecutor) -> None:
    iterator.close()
    pool.shutdown(cancel_futures=True)  # what has begun ends by itself


def _fill(fill_row: Callable[[int], object], rows: range) -> None:
    for row in rows:
        fill_row(row)
