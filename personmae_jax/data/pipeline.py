"""Batch k of host p, as a function of (seed, k, p) and nothing else.

Row i of the global batch k is position k * batch_size + i of an endless stream of
records, shuffled anew every epoch, and everything random about it comes from (seed,
position). So workers, threads, hosts and the first step change nothing, and resuming
is starting at a step: no iterator has a state to save.

The unit of the grain graph is a whole batch, whose rows a pool of threads decodes
straight into place. Stock `.batch` stacks and copies, which doubles the cost of an
image; a batch per thread would hold 16 batches in memory, and bring the first one
late.
"""

import copy
import math
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent import futures
from typing import Any, NamedTuple

import cv2
import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from numpy.random.bit_generator import ISeedSequence

from personmae_jax.config import Config
from personmae_jax.data import images, masks, regions
from personmae_jax.data.bad_records import describe_bad
from personmae_jax.data.images import Outcome
from personmae_jax.data.records import Records
from personmae_jax.errors import RunError

_NUM_REPLACEMENTS = 100  # records tried in the place of a bad one
_BATCHES_AHEAD = 2  # held by this process, or by each worker

Batch = dict[str, np.ndarray]


class Example(NamedTuple):
    """One row of a batch, with the image that it was cut from."""

    image: UInt8[np.ndarray, "h w 3"]  # as the network sees it: flipped or not
    box_a: regions.Box  # in the frame of `image`, as `box_b` is
    box_b: regions.Box
    region_a: UInt8[np.ndarray, "height width 3"]
    region_b: UInt8[np.ndarray, "height width 3"]
    visible: Int32[np.ndarray, " v"]  # see `masks.sample_visible`
    geometry: Float32[np.ndarray, "4"]  # see `regions.relative_geometry`
    record: int  # the record drawn, also where another one had to replace it
    outcome: Outcome  # of the record drawn


class PretrainBatches:
    """The batches of one host; picklable, and read by many threads at once."""

    def __init__(
        self, records: Records, cfg: Config, *, host: int = 0, num_hosts: int = 1
    ):
        """Prepares the stream; nothing is read yet.

        Args:
          records: Where images come from.
          cfg: A checked configuration.
          host: This process's index, from 0.
          num_hosts: Number of processes, a divisor of `cfg.train.batch_size`; rows
            host, host + num_hosts, ... of every global batch belong to this one.
        """
        self._records = records
        self._cfg = cfg
        self._host = host
        self._num_hosts = num_hosts
        self._stream: Any = (
            grain.MapDataset.range(len(records)).seed(cfg.train.seed).shuffle().repeat()
        )
        self._pool = futures.ThreadPoolExecutor(cfg.data.num_threads)

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_pool"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._pool = futures.ThreadPoolExecutor(self._cfg.data.num_threads)

    def __getitem__(self, step: int) -> Batch:
        """This host's rows of the global batch of one step.

        Returns:
          A dict of arrays whose leading axis is b = batch_size / num_hosts:
          `region_a`, `region_b`: uint8 (b, height, width, 3), RGB.
          `visible`: int32 (b, v), see `masks.sample_visible`.
          `geometry`: float32 (b, 4), see `regions.relative_geometry`.
          `record`: int64 (b,), the record drawn for the row, and `outcome`: int8
          (b,), its `Outcome`; for the host only, see `bad_records.py`.

        Raises:
          RunError: Too many records in a row are bad.
        """
        cfg = self._cfg
        first = step * cfg.train.batch_size
        positions = range(
            first + self._host, first + cfg.train.batch_size, self._num_hosts
        )
        b = len(positions)
        region_shape = (b, cfg.data.height, cfg.data.width, 3)
        batch = {
            "region_a": np.empty(region_shape, np.uint8),
            "region_b": np.empty(region_shape, np.uint8),
            "visible": np.empty((b, cfg.num_patches - cfg.num_hidden), np.int32),
            "geometry": np.empty((b, 4), np.float32),
            "record": np.empty(b, np.int64),
            "outcome": np.empty(b, np.int8),
        }
        share = math.ceil(b / cfg.data.num_threads)
        tasks = [
            self._pool.submit(self._fill, batch, positions, range(b)[row : row + share])
            for row in range(0, b, share)
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

    def example(self, position: int) -> Example:
        """Row `position % batch_size` of global batch `position // batch_size`."""
        data = self._cfg.data
        region_a, region_b = np.empty((2, data.height, data.width, 3), np.uint8)
        return self._cut(*self._draw(position), region_a, region_b)

    def _fill(self, batch: Batch, positions: range, rows: range) -> None:
        for row in rows:
            example = self._cut(
                *self._draw(positions[row]),
                batch["region_a"][row],
                batch["region_b"][row],
            )
            batch["visible"][row] = example.visible
            batch["geometry"][row] = example.geometry
            batch["record"][row] = example.record
            batch["outcome"][row] = example.outcome

    def _draw(
        self, position: int
    ) -> tuple[np.random.Generator, Int32[np.ndarray, " v"], int]:
        """The row's randomness, its mask (the same for any image) and its record."""
        cfg = self._cfg
        key: Any = _Key(cfg.train.seed, position)
        rng = np.random.Generator(np.random.Philox(key))
        visible = masks.sample_visible(rng, *cfg.grid, cfg.masks)
        return rng, visible, self._stream[position]

    def _cut(
        self,
        rng: np.random.Generator,
        visible: Int32[np.ndarray, " v"],
        record: int,
        region_a: UInt8[np.ndarray, "height width 3"],
        region_b: UInt8[np.ndarray, "height width 3"],
    ) -> Example:
        """Decodes the record and cuts its regions into the arrays given."""
        cfg = self._cfg
        image, outcome = self._decode(record)
        box_a, box_b, is_flipped = regions.sample_regions(
            rng,
            image.shape[0],
            image.shape[1],
            cfg.regions,
            cfg.data.height,
            cfg.data.width,
        )
        if is_flipped:
            image = cv2.flip(image, 1)
        images.crop_resize(image, box_a, region_a)
        images.crop_resize(image, box_b, region_b)
        return Example(
            image=image,
            box_a=box_a,
            box_b=box_b,
            region_a=region_a,
            region_b=region_b,
            visible=visible,
            geometry=regions.relative_geometry(box_a, box_b, cfg.grid),
            record=record,
            outcome=outcome,
        )

    def _decode(self, record: int) -> tuple[UInt8[np.ndarray, "h w 3"], Outcome]:
        """A record's image, or the next usable one's in source order.

        Returns:
          The image, and the outcome of `record` itself.
        """
        data = self._cfg.data
        failures = []
        for offset in range(min(_NUM_REPLACEMENTS + 1, len(self._records))):
            index = (record + offset) % len(self._records)
            try:
                image, outcome = images.decode(
                    self._records.read(index),
                    max_pixels=data.max_pixels,
                    min_side=data.min_side,
                )
                return image, failures[0][1] if failures else outcome
            except images.BadImage as error:
                failures.append((index, error.outcome))
            except OSError:
                failures.append((index, Outcome.UNREADABLE))
        raise RunError(
            f"{len(failures)} images in a row are bad, and none is left to replace "
            f"them: {describe_bad(self._records, failures)}; mend or remove them"
        )


class BatchIterator(Iterator[Batch]):
    """Batches in order, made ahead in the background; close it when done."""

    def __init__(self, batches: PretrainBatches, steps: range):
        self._batches = copy.copy(batches)  # with threads of its own
        data = batches._cfg.data
        dataset = (
            grain.MapDataset.range(steps.start, steps.stop)
            .map(self._batches.__getitem__)
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=_BATCHES_AHEAD, prefetch_buffer_size=_BATCHES_AHEAD
                )
            )
        )
        if data.num_workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(data.num_workers), _init_worker
            )
        self._iterator = iter(dataset)
        self._iterator.start_prefetch()
        # Runs at exit too: workers left to themselves would hold it up for seconds.
        self._stop = weakref.finalize(self, _stop, self._iterator, self._batches._pool)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Stops threads and worker processes; safe to call twice."""
        self._stop()
        # Grain's must be gone before the interpreter takes its modules apart.
        self._iterator = iter(())


def _init_worker(index: int, count: int) -> None:
    """Makes a worker process live exactly as long as the process of the run.

    Ctrl-C, and a scheduler's SIGTERM, go to every process of a group; but the run's
    alone decides when to stop, and goes on until it has saved.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_the_run, daemon=True).start()


def _leave_with_the_run() -> None:
    run: Any = multiprocessing.parent_process()
    run.join()
    os._exit(1)


def _stop(iterator: grain.DatasetIterator, pool: futures.ThreadPoolExecutor) -> None:
    iterator.close()
    pool.shutdown(cancel_futures=True)  # what has begun ends by itself


class _Key(ISeedSequence):
    """Keys Philox by (seed, position) as they are; hashing them costs 5 us a row.

    Philox is made for such keys: streams of different keys are independent.
    """

    def __init__(self, seed: int, position: int):
        self._words = np.array((seed, position), np.uint64)

    def generate_state(self, n_words: int, dtype=np.uint32) -> np.ndarray:
        return self._words  # Philox asks for two words of 64 bits
