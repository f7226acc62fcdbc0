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
import os
import sys
import weakref
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

import cv2
import grain
import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from personmae_jax.config import Config
from personmae_jax.data import images, masks, regions
from personmae_jax.data.bad_records import describe_bad
from personmae_jax.data.draws import Draws, RecordOrder, Stream
from personmae_jax.data.images import Outcome
from personmae_jax.data.memory import Memory
from personmae_jax.data.records import Records
from personmae_jax.data.workers import live_with_parent
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
        self._order = RecordOrder(len(records), cfg.train.seed)
        rows = cfg.train.batch_size // num_hosts
        self._memory = Memory(2, rows, cfg.data.height, cfg.data.width, 3)
        self._pool = futures.ThreadPoolExecutor(_num_threads(cfg))

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "_pool"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._pool = futures.ThreadPoolExecutor(_num_threads(self._cfg))

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
        first = step * self._cfg.train.batch_size
        stop = first + self._cfg.train.batch_size
        positions = range(first + self._host, stop, self._num_hosts)
        batch, numbers = self._draw(positions, self._memory.take())
        rows = range(len(positions))
        share = math.ceil(len(rows) / _num_threads(self._cfg))
        tasks = [
            self._pool.submit(self._fill, batch, numbers, rows[i : i + share])
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

    def example(self, position: int) -> Example:
        """Row `position % batch_size` of global batch `position // batch_size`."""
        data = self._cfg.data
        both = np.empty((2, 1, data.height, data.width, 3), np.uint8)
        batch, numbers = self._draw(range(position, position + 1), both)
        image, box_a, box_b = self._fill_row(batch, numbers, 0)
        return Example(
            image=image,
            box_a=box_a,
            box_b=box_b,
            region_a=batch["region_a"][0],
            region_b=batch["region_b"][0],
            visible=batch["visible"][0],
            geometry=batch["geometry"][0],
            record=batch["record"].item(),
            outcome=Outcome(batch["outcome"].item()),
        )

    def _draw(
        self, positions: range, both: UInt8[np.ndarray, "2 b height width 3"]
    ) -> tuple[Batch, Float64[np.ndarray, "b n"]]:
        """The batch of these positions but for what depends on the images.

        Args:
          positions: Of the batch's rows.
          both: Memory for RegionA and RegionB.

        Returns:
          The batch, and the numbers that the regions are to be drawn from.
        """
        cfg, b = self._cfg, len(positions)
        draws = Draws(cfg.train.seed, positions)
        batch = {
            "region_a": both[0],
            "region_b": both[1],
            "visible": masks.sample_visible(draws, *cfg.grid, cfg.masks),
            "geometry": np.empty((b, 4), np.float32),
            "record": self._order.records(positions),
            "outcome": np.empty(b, np.int8),
        }
        return batch, draws.uniform(Stream.REGIONS, regions.NUM_DRAWS)

    def _fill(
        self, batch: Batch, numbers: Float64[np.ndarray, "b n"], rows: range
    ) -> None:
        for row in rows:
            self._fill_row(batch, numbers, row)

    def _fill_row(
        self, batch: Batch, numbers: Float64[np.ndarray, "b n"], row: int
    ) -> tuple[UInt8[np.ndarray, "h w 3"], regions.Box, regions.Box]:
        """Decodes the row's record and cuts its regions into place.

        Returns:
          The image, flipped or not, and its two boxes.
        """
        cfg = self._cfg
        image, outcome = self._decode(batch["record"][row].item())
        box_a, box_b, is_flipped = regions.sample_regions(
            numbers[row],
            image.shape[0],
            image.shape[1],
            cfg.regions,
            cfg.data.height,
            cfg.data.width,
        )
        if is_flipped:
            cv2.flip(image, 1, dst=image)
        images.crop_resize(image, box_a, batch["region_a"][row])
        images.crop_resize(image, box_b, batch["region_b"][row])
        batch["geometry"][row] = regions.relative_geometry(box_a, box_b, cfg.grid)
        batch["outcome"][row] = outcome
        return image, box_a, box_b

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
        if data.path is not None and not os.path.exists(data.path):
            raise RunError(
                f"config.data.path={data.path!r} is gone; mount it or bring it back, "
                "and start again to go on from the last checkpoint"
            )
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
    live_with_parent()


def _stop(iterator: grain.DatasetIterator, pool: futures.ThreadPoolExecutor) -> None:
    iterator.close()
    pool.shutdown(cancel_futures=True)  # what has begun ends by itself


def _num_threads(cfg: Config) -> int:
    """More than one a core only wait for each other."""
    return min(cfg.data.num_threads, os.cpu_count() or 1)
