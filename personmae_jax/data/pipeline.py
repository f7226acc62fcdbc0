"""Batch k of host p, as a function of (seed, k, p) and nothing else.

Row i of the global batch k is position k * batch_size + i of an endless stream of
records, shuffled anew every epoch, and everything random about it comes from (seed,
position). So workers, threads, hosts and the first step change nothing, and resuming
is starting at a step: no iterator has a state to save.

`batches.py` turns this into a stream that is made ahead.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Float64, Int32, UInt8

from personmae_jax.config import Config
from personmae_jax.data import images, masks, regions
from personmae_jax.data.bad_records import describe_bad
from personmae_jax.data.batches import Batch, HostBatches
from personmae_jax.data.buffer_pool import BufferPool
from personmae_jax.data.images import Outcome
from personmae_jax.data.records import Records
from personmae_jax.data.rng import BatchRng, RecordOrder, Stream
from personmae_jax.errors import RunError

_NUM_REPLACEMENTS = 100  # records tried in the place of a bad one


# An image, flipped or not, and its two boxes.
_Filled = tuple[UInt8[np.ndarray, "h w 3"], images.Box, images.Box]


class Example(NamedTuple):
    """One row of a batch, with the image that it was cut from."""

    image: UInt8[np.ndarray, "h w 3"]  # as the network sees it: flipped or not
    box_a: images.Box  # in the frame of `image`, as `box_b` is
    box_b: images.Box
    region_a: UInt8[np.ndarray, "height width 3"]
    region_b: UInt8[np.ndarray, "height width 3"]
    visible: Int32[np.ndarray, " v"]  # see `masks.sample_visible`
    geometry: Float32[np.ndarray, "4"]  # see `regions.relative_geometry`
    record: np.int64  # the record drawn, also where another one had to replace it
    outcome: np.int8  # of the record drawn; see `images.Outcome`


class PretrainBatches(HostBatches):
    """The batches of one host; picklable, and read by many threads at once.

    That of a step is a dict of arrays whose leading axis is b = batch_size / num_hosts:
      `region_a`, `region_b`: uint8 (b, height, width, 3), RGB.
      `visible`: int32 (b, v), see `masks.sample_visible`.
      `geometry`: float32 (b, 4), see `regions.relative_geometry`.
      `record`: int64 (b,), the record drawn for the row, and `outcome`: int8 (b,), its
        `Outcome`; for the host only, see `bad_records.py`.

    Making one raises RunError if too many records in a row are bad.
    """

    def __init__(self, records: Records, cfg: Config, **hosts: int):
        """Prepares the stream; nothing is read yet; `hosts` as in `HostBatches`."""
        super().__init__(
            cfg.train.batch_size,
            num_threads=cfg.data.num_threads,
            num_workers=cfg.data.num_workers,
            **hosts,
        )
        self._records = records
        self._cfg = cfg
        self._order = RecordOrder(len(records), cfg.train.seed)
        size = (cfg.data.height, cfg.data.width, 3)
        self._memory = BufferPool(2, self._num_rows, *size)

    def begin(self, positions: range) -> tuple[Batch, Callable[[int], _Filled]]:
        cfg, b = self._cfg, len(positions)
        both = self._memory.take()[:, :b]
        rng = BatchRng(cfg.train.seed, positions)
        batch = {
            "region_a": both[0],
            "region_b": both[1],
            "visible": masks.sample_visible(rng, *cfg.grid, cfg.masks),
            "geometry": np.empty((b, 4), np.float32),
            "record": self._order.records(positions),
            "outcome": np.empty(b, np.int8),
        }
        numbers = rng.uniform(Stream.REGIONS, regions.NUM_DRAWS)
        return batch, functools.partial(self._fill_row, batch, numbers)

    def example(self, position: int) -> Example:
        """Row `position % batch_size` of global batch `position // batch_size`."""
        batch, fill_row = self.begin(range(position, position + 1))
        image, box_a, box_b = fill_row(0)
        # Copies, which do not keep the memory of a whole batch.
        rows = {name: values[0].copy() for name, values in batch.items()}
        return Example(image=image, box_a=box_a, box_b=box_b, **rows)

    def _fill_row(
        self, batch: Batch, numbers: Float64[np.ndarray, "b n"], row: int
    ) -> _Filled:
        """Decodes the row's record and cuts its regions into place."""
        cfg = self._cfg
        image, outcome = self._decode(batch["record"][row].item())
        height, width, _ = image.shape
        box_a, box_b, is_flipped = regions.sample_regions(
            numbers[row], height, width, cfg.regions, cfg.data.height, cfg.data.width
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
            f"them: {describe_bad(self._records, failures)}; fix or remove them"
        )
